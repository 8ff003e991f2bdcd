// A loop, the loss after it, and the adjoints of both, at once (loop_driver.cpp; meta_gradients.py).

namespace {

struct Gradient {
  const Replay &loop, &loss;  // of the loss, each task has its state
  Places routes;  // where what the loss is given comes from: what the loop carries on, or after it, what is given besides
  Places through;  // of what the loop carries on, where it is in what the loop is given, if it only passes that on; else -1
  Value seed;     // the adjoint of the loss
  std::vector<Form> besides;  // of what is given besides what the loop is

  Gradient(const Replay& loop, const Replay& loss, Places routes, Places through, Value seed)
      : loop(loop), loss(loss), routes(std::move(routes)), through(std::move(through)), seed(std::move(seed)) {
    besides.resize(this->routes.size());
    size_t count = 0;
    for (size_t index = 0; index < this->routes.size(); ++index) {
      const int64_t place = this->routes[index] - carried();
      if (place < 0) continue;
      besides.at(place) = loss.given[index];
      ++count;
    }
    besides.resize(count);
  }

  int64_t carried() const { return loop.last.size(); }
  size_t given() const { return loop.given.size() + besides.size(); }
  const Form& form(size_t index) const {
    return index < loop.given.size() ? loop.given[index] : besides[index - loop.given.size()];
  }
};

// Whether a value has a form as it is.
bool is_of(const Value& value, const Form& form) {
  const Handle& one = value;
  if (one.dtype != form.dtype || one.dims != static_cast<int32_t>(form.sizes.size())) return false;
  for (int32_t dim = 0; dim < one.dims; ++dim) {
    if (one.sizes[dim] != form.sizes[dim] || (one.sizes[dim] > 1 && one.strides[dim] != form.strides[dim])) return false;
  }
  return true;
}

struct Gradients {
  enum { FOUND, OTHER_CONDITIONS, OTHER_FORMS } how = FOUND;
  Value loss;
  Values found;  // of what is differentiated: of what the loop is given, then of what is given besides
};

// What the loss is given, of what the loop carries on and of what is given besides; tells whether it has its forms.
bool give(const Gradient& gradient, const Values& carried, const Values& all, Values& to_loss) {
  bool fits = true;
  for (size_t index = 0; index < gradient.routes.size(); ++index) {
    const int64_t place = gradient.routes[index], besides = place - gradient.carried();
    to_loss.push_back((besides < 0 ? carried[place] : all[gradient.loop.given.size() + besides]).share());
    fits &= is_of(to_loss.back(), gradient.loss.given[index]);
  }
  return fits;
}

// The adjoints of what is differentiated, from those of what the loss was given.
bool go_back(const Gradient& gradient, const Tape& tape, const Values& adjoints, Values& found) {
  const Replay& loop = gradient.loop;
  Values last(loop.made.size()), besides;
  std::vector<std::pair<size_t, Value>> passed;
  for (size_t index = 0; index < adjoints.size(); ++index) {
    const int64_t place = gradient.routes[gradient.loss.sources[index]];
    Value adjoint = adjoints[index].share();
    if (place >= gradient.carried()) {
      besides.push_back(std::move(adjoint));
    } else if (!adjoint) {
      continue;
    } else if (const int64_t origin = gradient.through[place]; origin >= 0) {
      const auto source = std::find(loop.sources.begin(), loop.sources.end(), origin);
      if (source == loop.sources.end()) continue;
      if (!loop.led.empty()) adjoint = over_tasks(adjoint, loop.given[origin]);
      passed.emplace_back(source - loop.sources.begin(), std::move(adjoint));
    } else {
      if (!is_of(adjoint, loop.last[place])) return false;
      last[std::find(loop.made.begin(), loop.made.end(), place) - loop.made.begin()] = std::move(adjoint);
    }
  }
  found = back_again(loop, tape, last, Values(loop.loop.step(0).returned.size()));
  for (auto& [index, adjoint] : passed) found[index] = found[index] ? sum_of(found[index], adjoint) : std::move(adjoint);
  for (auto& one : besides) found.push_back(std::move(one));
  return true;
}

Gradients gradients_of(const Gradient& gradient, const Values& all) {
  Gradients made;
  Tape tape, last_tape;
  Values given, to_loss, seeds;
  for (size_t index = 0; index < gradient.loop.given.size(); ++index) given.push_back(all[index].share());
  Outcome outcome = run_again(gradient.loop, given, tape);
  if (!give(gradient, outcome.carried, all, to_loss)) {
    made.how = Gradients::OTHER_FORMS;
  } else if (!outcome.held) {
    made.how = Gradients::OTHER_CONDITIONS;
  }
  if (made.how != Gradients::FOUND) return made;
  outcome = Outcome();
  const Outcome after = run_again(gradient.loss, to_loss, last_tape);
  if (!after.held) {
    made.how = Gradients::OTHER_CONDITIONS;
    return made;
  }
  made.loss = after.returned[0][0].share();
  seeds.push_back(gradient.seed.share());
  const Values adjoints = back_again(gradient.loss, last_tape, Values(gradient.loss.made.size()), seeds);
  to_loss.clear(), last_tape = Tape();  // the way back through the loop takes memory of its own
  if (!go_back(gradient, tape, adjoints, made.found)) made.how = Gradients::OTHER_FORMS;
  return made;
}

}  // namespace
