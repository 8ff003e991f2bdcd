// The loop over compiled steps, there and back (loop_driver.cpp).

#include "loop_memory.h"

namespace {

using Values = std::vector<Value>;

// The tables of one step: see `Bound` in binding.py.
struct Step {
  int64_t pool, before, batch;   // how many there are: in the pool; of these carried into the step, and of its batch
  int64_t values, saved, found;  // results; results and fresh residuals; adjoints that the step computes
  Places take, carry, returned, residuals, accumulators;
  int64_t held;  // -1: there are no conditions
  std::vector<Places> seeds;
  Pairs passed, to_carried, to_shared, to_batch;
  Places unused;
  Values zeros, no_adjoints;

  // Whether its adjoint needs nothing that the step computes.
  bool keeps_inputs_only() const {
    const int64_t inputs = take.size();
    return std::all_of(residuals.begin(), residuals.end(), [=](int64_t place) { return place < inputs; });
  }
};

struct Programs {
  Entry plain, saving, backward;
};

// A loop: its distinct steps, and which of them each step is.
struct Loop {
  std::vector<const Step*> steps;
  std::vector<Programs> programs;
  Places order;
  int64_t segment;  // 0: residuals are kept

  const Step& step(size_t index) const { return *steps[order[index]]; }
  const Programs& at(size_t index) const { return programs[order[index]]; }
  bool starts_segment(size_t index) const { return segment && index % segment == 0; }
};

// What a loop that ran left for the way back: see `Tape` in loop.py.
struct Tape {
  std::vector<Values> kept;
  Values shared;
  std::vector<Values> rest;
};

struct Outcome {
  Values carried;
  std::vector<Values> returned;  // of each step
  bool held = true;  // whether the conditions of all steps did
};

Values share(const Values& values) {
  Values made;
  made.reserve(values.size());
  for (const auto& value : values) made.push_back(value.share());
  return made;
}

// Calls a program; it owns the inputs from then on.
Values call(Entry entry, Values inputs, size_t results) {
  std::vector<Handle> given, made(results);
  given.reserve(inputs.size());
  for (auto& value : inputs) given.push_back(value.release());
  entry(given.data(), made.data());
  Values found;
  found.reserve(results);
  for (const auto& handle : made) found.emplace_back(handle);
  return found;
}

// ------------------------------------------------------------------------------------------------------------ forward

using Available = std::vector<const Value*>;  // a step's pool: see binding.py

Available available(const Values& carried, const Values& shared, const Values& rest) {
  Available pool;
  pool.reserve(carried.size() + shared.size() + rest.size());
  for (const auto* part : {&carried, &shared, &rest}) {
    for (const auto& value : *part) pool.push_back(&value);
  }
  return pool;
}

Values residuals_of(const Step& step, const Available& pool, const Values& found) {
  Values kept;
  kept.reserve(step.residuals.size());
  const int64_t inputs = step.take.size();
  for (auto place : step.residuals) {
    kept.push_back(place < inputs ? pool[step.take[place]]->share() : found[place - inputs].share());
  }
  return kept;
}

Values carried_on(const Step& step, const Available& pool, const Values& found) {
  Values carried;
  carried.reserve(step.carry.size());
  for (auto place : step.carry) {
    carried.push_back(place < step.pool ? pool[place]->share() : found[place - step.pool].share());
  }
  return carried;
}

// Whether all elements of a tensor of flags are set.
bool holds(const Handle& flags) {
  const char *begin = flags.data, *end = begin + extent(flags);
  return std::find(begin, end, 0) == end;
}

// While there is one of a tape that no cache near the core holds, products ask early for what they multiply.
class Distance {
 public:
  Distance() = default;
  Distance(const Distance&) = delete;
  ~Distance() { gimli::far_loops -= far_; }

  // Learns, once, what is kept of one step, and of how many.
  void measure(const Values& kept, size_t steps) {
    size_t bytes = 0;
    for (const auto& value : kept) bytes += extent(value) * item_size(value.get().dtype);
    far_ = bytes * steps > CLOSE;
    gimli::far_loops += far_;
  }

 private:
  static constexpr size_t CLOSE = 4 << 20;
  bool far_ = false;
};

// Runs the steps from `first` to `end`; keeps their residuals, or with segments their boundaries, if there is a `kept`.
// With `again`, nothing but the residuals is asked for: where those of the last step are its inputs, it does not run.
Outcome run_steps(const Loop& loop, size_t first, size_t end, const Values& start, const Values& shared,
                  const std::vector<Values>& rest, std::vector<Values>* kept, bool boundaries, bool again = false) {
  Outcome outcome;
  outcome.carried = share(start);
  Distance distance;
  const bool saves = kept && !boundaries;
  for (size_t index = first; index < end; ++index) {
    const Step& step = loop.step(index);
    if (kept && boundaries && loop.starts_segment(index)) kept->push_back(share(outcome.carried));
    const Available pool = available(outcome.carried, shared, rest[index]);
    if (again && index + 1 == end && step.keeps_inputs_only()) {
      kept->push_back(residuals_of(step, pool, {}));
      break;
    }
    Values inputs;
    inputs.reserve(step.take.size());
    for (auto place : step.take) inputs.push_back(pool[place]->share());
    const auto& programs = loop.at(index);
    Values found = saves ? call(programs.saving, std::move(inputs), step.saved)
                         : call(programs.plain, std::move(inputs), step.values);
    if (saves) {
      kept->push_back(residuals_of(step, pool, found));
      if (index == first) distance.measure(kept->back(), end - first);
    }
    Values carried = carried_on(step, pool, found);
    Values returned;
    for (auto place : step.returned) returned.push_back(found[place].share());
    outcome.returned.push_back(std::move(returned));
    if (step.held >= 0) outcome.held &= holds(found[step.held]);
    outcome.carried = std::move(carried);
  }
  return outcome;
}

// ----------------------------------------------------------------------------------------------------------- backward

struct Adjoints {
  Values carried, shared;
  std::vector<Values> batches;
};

Value total(const std::vector<const Value*>& given, const Places& places) {
  Value sum = given[places[0]]->share();
  for (size_t index = 1; index < places.size(); ++index) sum = sum_of(sum, *given[places[index]]);
  return sum;
}

// One step of what leads with the steps.
Value at_step(const Value& all, int64_t index) {
  if (!all) return Value();
  Handle one = all.share().release();
  one.data += index * one.strides[0] * item_size(one.dtype);
  ++one.sizes, ++one.strides, --one.dims;
  return Value(one);
}

void step_back(const Step& step, Entry backward, Values residuals, const Values& returned, Adjoints& adjoints,
               Values& batch) {
  std::vector<const Value*> given;
  for (const auto& value : adjoints.carried) given.push_back(&value);
  for (size_t index = 0; index < step.returned.size(); ++index) {
    given.push_back(returned[index] ? &returned[index] : &step.no_adjoints[index]);
  }
  Values inputs = std::move(residuals);
  inputs.reserve(inputs.size() + step.seeds.size() + step.accumulators.size());
  for (const auto& places : step.seeds) inputs.push_back(total(given, places));
  for (auto place : step.accumulators) inputs.push_back(std::move(adjoints.shared[place]));
  Values found = call(backward, std::move(inputs), step.found);
  Values before(step.before);
  for (auto [place, source] : step.passed) before[place] = adjoints.carried[source].share();
  for (auto [number, place] : step.to_carried) {
    before[place] = before[place] ? sum_of(before[place], found[number]) : found[number].share();
  }
  for (auto [number, place] : step.to_shared) adjoints.shared[place] = found[number].share();
  for (auto [number, place] : step.to_batch) batch[place] = found[number].share();
  for (size_t index = 0; index < step.unused.size(); ++index) before[step.unused[index]] = zeros_like(step.zeros[index]);
  adjoints.carried = std::move(before);
}

void run_back(const Loop& loop, const Tape& tape, const Values& returned, Adjoints& adjoints) {
  Distance distance;
  if (!tape.kept.empty()) distance.measure(tape.kept.back(), tape.kept.size());
  const int64_t steps = loop.order.size();
  std::vector<Values> recomputed;
  for (int64_t index = steps - 1; index >= 0; --index) {
    const Step& step = loop.step(index);
    Values residuals;
    if (!loop.segment) {
      residuals = share(tape.kept[index]);
    } else {
      if (recomputed.empty()) {
        const int64_t first = index - index % loop.segment;
        const auto& start = tape.kept[first / loop.segment];
        run_steps(loop, first, index + 1, start, tape.shared, tape.rest, &recomputed, false, true);
      }
      residuals = std::move(recomputed.back());
      recomputed.pop_back();
    }
    Values now;
    for (const auto& all : returned) now.push_back(at_step(all, index));
    step_back(step, loop.at(index).backward, std::move(residuals), now, adjoints, adjoints.batches[index]);
  }
}

}  // namespace
