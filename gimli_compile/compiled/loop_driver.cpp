// The loop over compiled steps, without Python between them: what `loop.py` does in Python, on the same tables.
//
// A step's programs are functions that Inductor exports from their libraries. They take handles, which they own from
// then on, and return handles. Handles of tensors come from Python, and go back, as capsules.

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

using Handle = AtenTensorHandle;
using Entry = void (*)(Handle*, Handle*);
using Places = std::vector<int64_t>;
using Pairs = std::vector<std::pair<int64_t, int64_t>>;

struct PythonError {};  // Python already knows

void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("a call of torch failed in the loop of compiled steps");
}

// One tensor, owned; or none.
class Value {
 public:
  Value() = default;
  explicit Value(Handle handle) : handle_(handle) {}
  Value(Value&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Value& operator=(Value&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Value() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  explicit operator bool() const { return handle_ != nullptr; }
  Handle get() const { return handle_; }
  Handle release() { return std::exchange(handle_, nullptr); }

  // The same tensor once more.
  Value share() const {
    if (!handle_) return Value();
    Handle made;
    check(aoti_torch_new_tensor_handle(handle_, &made));
    return Value(made);
  }

  // Another tensor on the same memory: what autograd ties to one of them does not reach the other.
  Value alias() const {
    int64_t dims, *sizes, *strides;
    check(aoti_torch_get_dim(handle_, &dims));
    check(aoti_torch_get_sizes(handle_, &sizes));
    check(aoti_torch_get_strides(handle_, &strides));
    Handle made;
    check(aoti_torch__reinterpret_tensor(handle_, dims, sizes, strides, 0, &made));
    return Value(made);
  }

  Value clone() const {
    Handle made;
    check(aoti_torch_clone(handle_, &made));
    return Value(made);
  }

  Value plus(const Value& other) const {
    Handle made;
    check(aoti_torch_cpu_add_Tensor(handle_, other.handle_, 1.0, &made));
    return Value(made);
  }

 private:
  Handle handle_ = nullptr;
};

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
  Values held;
};

Values share(const Values& values) {
  Values made;
  made.reserve(values.size());
  for (const auto& value : values) made.push_back(value.share());
  return made;
}

// Calls a program; it owns the inputs from then on.
Values call(Entry entry, Values inputs, size_t results) {
  std::vector<Handle> given, made(results, nullptr);
  given.reserve(inputs.size());
  for (auto& value : inputs) given.push_back(value.release());
  entry(given.data(), made.data());
  Values found;
  found.reserve(results);
  for (auto handle : made) found.emplace_back(handle);
  if (PyErr_Occurred()) throw PythonError();
  return found;
}

// ------------------------------------------------------------------------------------------------------------ forward

using Pool = std::vector<const Value*>;

Pool pool_of(const Values& carried, const Values& shared, const Values& rest) {
  Pool pool;
  pool.reserve(carried.size() + shared.size() + rest.size());
  for (const auto* part : {&carried, &shared, &rest}) {
    for (const auto& value : *part) pool.push_back(&value);
  }
  return pool;
}

Values residuals_of(const Step& step, const Pool& pool, const Values& found) {
  Values kept;
  kept.reserve(step.residuals.size());
  const int64_t inputs = step.take.size();
  for (auto place : step.residuals) {
    kept.push_back(place < inputs ? pool[step.take[place]]->share() : found[place - inputs].share());
  }
  return kept;
}

Values carried_on(const Step& step, const Pool& pool, const Values& found) {
  Values carried;
  carried.reserve(step.carry.size());
  for (auto place : step.carry) {
    carried.push_back(place < step.pool ? pool[place]->share() : found[place - step.pool].share());
  }
  return carried;
}

// Runs the steps from `first` to `end`; keeps their residuals, or with segments their boundaries, if there is a `kept`.
Outcome run_steps(const Loop& loop, size_t first, size_t end, const Values& start, const Values& shared,
                  const std::vector<Values>& rest, std::vector<Values>* kept, bool boundaries) {
  Outcome outcome;
  outcome.carried = share(start);
  const bool saves = kept && !boundaries;
  for (size_t index = first; index < end; ++index) {
    const Step& step = loop.step(index);
    if (kept && boundaries && loop.starts_segment(index)) kept->push_back(share(outcome.carried));
    const Pool pool = pool_of(outcome.carried, shared, rest[index]);
    Values inputs;
    inputs.reserve(step.take.size());
    for (auto place : step.take) inputs.push_back(pool[place]->share());
    const auto& programs = loop.at(index);
    Values found = saves ? call(programs.saving, std::move(inputs), step.saved)
                         : call(programs.plain, std::move(inputs), step.values);
    if (saves) kept->push_back(residuals_of(step, pool, found));
    Values carried = carried_on(step, pool, found);
    Values returned;
    for (auto place : step.returned) returned.push_back(found[place].share());
    outcome.returned.push_back(std::move(returned));
    if (step.held >= 0) outcome.held.push_back(found[step.held].share());
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
  for (size_t index = 1; index < places.size(); ++index) sum = sum.plus(*given[places[index]]);
  return sum;
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
    before[place] = before[place] ? before[place].plus(found[number]) : found[number].share();
  }
  for (auto [number, place] : step.to_shared) adjoints.shared[place] = found[number].share();
  for (auto [number, place] : step.to_batch) batch[place] = found[number].share();
  for (size_t index = 0; index < step.unused.size(); ++index) before[step.unused[index]] = step.zeros[index].clone();
  adjoints.carried = std::move(before);
}

void run_back(const Loop& loop, const Tape& tape, const std::vector<Values>& returned, Adjoints& adjoints) {
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
        run_steps(loop, first, index + 1, start, tape.shared, tape.rest, &recomputed, false);
      }
      residuals = std::move(recomputed.back());
      recomputed.pop_back();
    }
    step_back(step, loop.at(index).backward, std::move(residuals), returned[index], adjoints, adjoints.batches[index]);
  }
}

// ------------------------------------------------------------------------------------------------- from and to Python

PyObject* item(PyObject* tuple, Py_ssize_t index) {
  PyObject* found = PyTuple_GetItem(tuple, index);
  if (!found) throw PythonError();
  return found;
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

template <typename Made, typename Read>
std::vector<Made> read_all(PyObject* sequence, Read read) {
  std::unique_ptr<PyObject, void (*)(PyObject*)> fast(PySequence_Fast(sequence, "a sequence is needed"), Py_DecRef);
  if (!fast) throw PythonError();
  std::vector<Made> made;
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(fast.get());
  made.reserve(size);
  for (Py_ssize_t index = 0; index < size; ++index) made.push_back(read(PySequence_Fast_GET_ITEM(fast.get(), index)));
  return made;
}

Places places(PyObject* sequence) { return read_all<int64_t>(sequence, integer); }

Pairs pairs(PyObject* sequence) {
  return read_all<std::pair<int64_t, int64_t>>(
      sequence, [](PyObject* pair) { return std::make_pair(integer(item(pair, 0)), integer(item(pair, 1))); });
}

// Takes a tensor out of its capsule, which holds nothing any more: a second look would own it twice.
Value value_of(PyObject* capsule) {
  if (capsule == Py_None) return Value();
  void* pointer = PyCapsule_GetPointer(capsule, nullptr);
  if (!pointer) throw PythonError();
  return Value(reinterpret_cast<Handle>(pointer));
}

Values values(PyObject* sequence) { return read_all<Value>(sequence, value_of); }

std::vector<Values> values_of_steps(PyObject* sequence) { return read_all<Values>(sequence, values); }

template <typename Owned>
PyObject* capsule_of(std::unique_ptr<Owned> owned, const char* name) {
  auto destroy = [](PyObject* capsule) {
    delete static_cast<Owned*>(PyCapsule_GetPointer(capsule, PyCapsule_GetName(capsule)));
  };
  PyObject* made = PyCapsule_New(owned.get(), name, destroy);
  if (!made) throw PythonError();
  owned.release();
  return made;
}

template <typename Owned>
Owned& in_capsule(PyObject* capsule, const char* name) {
  void* pointer = PyCapsule_GetPointer(capsule, name);
  if (!pointer) throw PythonError();
  return *static_cast<Owned*>(pointer);
}

void append(PyObject* list, Value value) {
  PyObject* made = value ? PyCapsule_New(value.get(), nullptr, nullptr) : Py_NewRef(Py_None);
  if (!made || PyList_Append(list, made)) throw PythonError();
  Py_DECREF(made);
  value.release();
}

void append_all(PyObject* list, Values values) {
  for (auto& value : values) append(list, std::move(value));
}

constexpr const char* STEP = "gimli_compile.step";
constexpr const char* TAPE = "gimli_compile.tape";

Loop loop_of(PyObject* steps, PyObject* programs, PyObject* order, PyObject* segment) {
  Loop loop;
  loop.steps = read_all<const Step*>(steps, [](PyObject* one) { return &in_capsule<const Step>(one, STEP); });
  loop.programs = read_all<Programs>(programs, [](PyObject* of_step) {
    auto entry = [&](int place) { return reinterpret_cast<Entry>(integer(item(of_step, place))); };
    return Programs{entry(0), entry(1), entry(2)};
  });
  loop.order = places(order);
  loop.segment = integer(segment);
  return loop;
}

// ------------------------------------------------------------------------------------------------ what Python can call

// step(counts, take, carry, returned, residuals, accumulators, seeds, passed, to_carried, to_shared, to_batch, unused,
//      zeros, no_adjoints) -> the tables of a step
PyObject* make_step(PyObject* given) {
  auto step = std::make_unique<Step>();
  const Places counts = places(item(given, 0));
  step->pool = counts.at(0), step->before = counts.at(1), step->batch = counts.at(2);
  step->values = counts.at(3), step->saved = counts.at(4), step->found = counts.at(5), step->held = counts.at(6);
  step->take = places(item(given, 1)), step->carry = places(item(given, 2)), step->returned = places(item(given, 3));
  step->residuals = places(item(given, 4)), step->accumulators = places(item(given, 5));
  step->seeds = read_all<Places>(item(given, 6), places);
  step->passed = pairs(item(given, 7)), step->to_carried = pairs(item(given, 8));
  step->to_shared = pairs(item(given, 9)), step->to_batch = pairs(item(given, 10));
  step->unused = places(item(given, 11));
  step->zeros = values(item(given, 12)), step->no_adjoints = values(item(given, 13));
  return capsule_of(std::move(step), STEP);
}

// forward(steps, programs, order, segment, record, carried, shared, rest, made) -> (tensors, tape): what is carried out
// of the last step, what each step returned, and whether the conditions of each held. Of what is carried out, steps made
// those at the places `made`. Autograd ties the loop's results to the node that holds the tape: the tape has others.
PyObject* forward(PyObject* given) {
  const Loop loop = loop_of(item(given, 0), item(given, 1), item(given, 2), item(given, 3));
  const bool record = integer(item(given, 4));
  const Values carried = values(item(given, 5));
  auto tape = std::make_unique<Tape>();
  tape->shared = values(item(given, 6));
  tape->rest = values_of_steps(item(given, 7));
  Outcome outcome = run_steps(loop, 0, loop.order.size(), carried, tape->shared, tape->rest,
                              record ? &tape->kept : nullptr, loop.segment != 0);
  if (record) {
    for (auto place : places(item(given, 8))) outcome.carried[place] = outcome.carried[place].alias();
  }
  if (!loop.segment) tape->shared.clear(), tape->rest.clear();
  std::unique_ptr<PyObject, void (*)(PyObject*)> tensors(PyList_New(0), Py_DecRef);
  if (!tensors) throw PythonError();
  append_all(tensors.get(), std::move(outcome.carried));
  for (auto& of_step : outcome.returned) append_all(tensors.get(), std::move(of_step));
  append_all(tensors.get(), std::move(outcome.held));
  return Py_BuildValue("(NN)", tensors.release(), capsule_of(std::move(tape), TAPE));
}

// backward(steps, programs, order, segment, tape, carried, shared, returned) -> tensors: the adjoints of what is
// carried into the first step, of what is shared, and of each step's batch
PyObject* backward(PyObject* given) {
  const Loop loop = loop_of(item(given, 0), item(given, 1), item(given, 2), item(given, 3));
  const Tape& tape = in_capsule<const Tape>(item(given, 4), TAPE);
  Adjoints adjoints{values(item(given, 5)), values(item(given, 6)), {}};
  const std::vector<Values> returned = values_of_steps(item(given, 7));
  for (size_t index = 0; index < loop.order.size(); ++index) adjoints.batches.emplace_back(loop.step(index).batch);
  run_back(loop, tape, returned, adjoints);
  std::unique_ptr<PyObject, void (*)(PyObject*)> tensors(PyList_New(0), Py_DecRef);
  if (!tensors) throw PythonError();
  append_all(tensors.get(), std::move(adjoints.carried));
  append_all(tensors.get(), std::move(adjoints.shared));
  for (auto& of_step : adjoints.batches) append_all(tensors.get(), std::move(of_step));
  return tensors.release();
}

// contents(tape) -> (kept, shared, rest): the tensors of a tape, for the loop in Python
PyObject* contents(PyObject* given) {
  const Tape& tape = in_capsule<const Tape>(item(given, 0), TAPE);
  auto listed = [](const Values& values) {
    PyObject* list = PyList_New(0);
    if (!list) throw PythonError();
    append_all(list, share(values));
    return list;
  };
  auto all_listed = [&](const std::vector<Values>& steps) {
    PyObject* lists = PyList_New(0);
    if (!lists) throw PythonError();
    for (const auto& of_step : steps) {
      PyObject* list = listed(of_step);
      if (PyList_Append(lists, list)) throw PythonError();
      Py_DECREF(list);
    }
    return lists;
  };
  return Py_BuildValue("(NNN)", all_listed(tape.kept), listed(tape.shared), all_listed(tape.rest));
}

template <PyObject* (*function)(PyObject*)>
PyObject* guarded(PyObject*, PyObject* given) {
  try {
    return function(given);
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {{"step", guarded<make_step>, METH_VARARGS, "Returns the tables of a step."},
                         {"forward", guarded<forward>, METH_VARARGS, "Runs a loop."},
                         {"backward", guarded<backward>, METH_VARARGS, "Runs the adjoints of a loop's steps."},
                         {"contents", guarded<contents>, METH_VARARGS, "Returns the tensors of a tape."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "loop_driver", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_loop_driver() { return PyModule_Create(&definition); }
