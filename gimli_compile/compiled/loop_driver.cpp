// The loop over compiled steps, without Python between them: what `loop.py` does in Python, on the same tables.
//
// A step's programs are functions of libraries (lean_program.h). They take handles, which they own from then on, and
// give handles. Tensors of torch come from Python, and go back, as handles of torch in capsules.

#include <Python.h>

#include "loop_steps.h"
#include "loop_replays.h"
#include "loop_gradients.h"

namespace {

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

// Takes a tensor out of its capsule, which must not be looked at again: it would be owned twice.
Value value_of(PyObject* capsule) {
  if (capsule == Py_None) return Value();
  void* pointer = PyCapsule_GetPointer(capsule, nullptr);
  if (!pointer) throw PythonError();
  return given_value(static_cast<AtenTensorHandle>(pointer), true);
}

Values values(PyObject* sequence) { return read_all<Value>(sequence, value_of); }

std::vector<Values> values_of_steps(PyObject* sequence) { return read_all<Values>(sequence, values); }

using Object = std::unique_ptr<PyObject, void (*)(PyObject*)>;

Object list() {
  Object made(PyList_New(0), Py_DecRef);
  if (!made) throw PythonError();
  return made;
}

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

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

void append(PyObject* list, AtenTensorHandle tensor) {
  Object made(tensor ? PyCapsule_New(tensor, nullptr, nullptr) : Py_NewRef(Py_None), Py_DecRef);
  if (!made || PyList_Append(list, made.get())) throw PythonError();
}

void append_all(PyObject* list, const Values& values) {
  for (const auto& value : values) append(list, value ? torch_tensor(value) : nullptr);
}

constexpr const char* STEP = "gimli_compile.step";
constexpr const char* TAPE = "gimli_compile.tape";
constexpr const char* REPLAY = "gimli_compile.replay";
constexpr const char* GRADIENT = "gimli_compile.gradient";

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

// What the steps returned at one place, stacked in the last dimension.
AtenTensorHandle stacked(const std::vector<Values>& returned, size_t place) {
  const Handle& first = returned[0][place];
  const int64_t steps = returned.size(), item = item_size(first.dtype);
  std::vector<int64_t> sizes(first.sizes, first.sizes + first.dims), strides(first.dims + 1);
  sizes.push_back(steps);
  int64_t count = 1;
  for (int32_t dim = first.dims; dim >= 0; --dim) strides[dim] = count, count *= sizes[dim];
  AtenTensorHandle made;
  check(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), first.dtype, aoti_torch_device_type_cpu(), 0,
                                 &made));
  void* data;
  check(aoti_torch_get_data_ptr(made, &data));
  for (int64_t step = 0; step < steps; ++step) {
    const char* from = returned[step][place].get().data;
    char* to = static_cast<char*>(data) + step * item;
    for (int64_t index = 0; index < count / steps; ++index) std::memcpy(to + index * steps * item, from + index * item, item);
  }
  return made;
}

// forward(steps, programs, order, segment, record, carried, shared, rest, one_base) -> (carried, stacked, watched, held,
// tape): what is carried out of the last step, what the steps returned, the tensors that the tape shares with Python, and
// whether all conditions held. `one_base`: the batches of all steps are parts of the same tensors, which change together.
PyObject* forward(PyObject* given) {
  const Loop loop = loop_of(item(given, 0), item(given, 1), item(given, 2), item(given, 3));
  const bool record = integer(item(given, 4));
  const Values carried = values(item(given, 5));
  Values shared = values(item(given, 6));
  std::vector<Values> rest = values_of_steps(item(given, 7));
  if (integer(item(given, 8))) {
    for (size_t index = 1; index < rest.size(); ++index) {
      for (int64_t leaf = 0; leaf < loop.step(index).batch; ++leaf) rest[index][leaf].get().block->next = rest[0][leaf].get().block;
    }
  }
  Outcome outcome;
  auto tape = std::make_unique<Tape>();
  {
    const WithoutGil released;
    outcome = run_steps(loop, 0, loop.order.size(), carried, shared, rest, record ? &tape->kept : nullptr, loop.segment != 0);
  }
  Object last = list(), stacks = list(), watched = list();
  append_all(last.get(), outcome.carried);
  for (size_t place = 0; place < outcome.returned[0].size(); ++place) {
    append(stacks.get(), stacked(outcome.returned, place));
  }
  auto watch = [&](const Values& seen) {
    for (const auto& value : seen) {
      Block* block = value ? value.get().block : nullptr;
      if (block && block->given && block->next) block = block->next;
      if (!block || !block->watched) continue;
      block->watched = false;
      AtenTensorHandle tensor;
      check(aoti_torch_new_tensor_handle(static_cast<AtenTensorHandle>(block->tensor), &tensor));
      append(watched.get(), tensor);
    }
  };
  for (const auto& of_step : tape->kept) watch(of_step);
  if (record && loop.segment) {
    watch(shared);
    for (const auto& of_step : rest) watch(of_step);
    tape->shared = std::move(shared), tape->rest = std::move(rest);
  }
  PyObject* held = PyBool_FromLong(outcome.held);
  return Py_BuildValue("(NNNNN)", last.release(), stacks.release(), watched.release(), held,
                       capsule_of(std::move(tape), TAPE));
}

// backward(steps, programs, order, segment, tape, carried, shared, returned) -> tensors: the adjoints of what is
// carried into the first step, of what is shared, and of each step's batch if any is. `returned` lead with the steps.
PyObject* backward(PyObject* given) {
  const Loop loop = loop_of(item(given, 0), item(given, 1), item(given, 2), item(given, 3));
  const Tape& tape = in_capsule<const Tape>(item(given, 4), TAPE);
  Adjoints adjoints{values(item(given, 5)), values(item(given, 6)), {}};
  const Values returned = values(item(given, 7));
  for (size_t index = 0; index < loop.order.size(); ++index) adjoints.batches.emplace_back(loop.step(index).batch);
  {
    const WithoutGil released;
    run_back(loop, tape, returned, adjoints);
  }
  Object tensors = list();
  append_all(tensors.get(), adjoints.carried);
  append_all(tensors.get(), adjoints.shared);
  const bool to_batches =
      std::any_of(loop.steps.begin(), loop.steps.end(), [](const Step* step) { return !step->to_batch.empty(); });
  if (to_batches) {
    for (const auto& of_step : adjoints.batches) append_all(tensors.get(), of_step);
  }
  return tensors.release();
}

// contents(tape) -> (kept, shared, rest): the tensors of a tape, for the loop in Python
PyObject* contents(PyObject* given) {
  const Tape& tape = in_capsule<const Tape>(item(given, 0), TAPE);
  auto lists = [](const std::vector<Values>& steps) -> PyObject* {
    Object made = list();
    for (const auto& of_step : steps) {
      Object one = list();
      append_all(one.get(), of_step);
      if (PyList_Append(made.get(), one.get())) throw PythonError();
    }
    return made.release();
  };
  Object shared = list();
  append_all(shared.get(), tape.shared);
  return Py_BuildValue("(NNN)", lists(tape.kept), shared.release(), lists(tape.rest));
}

// replay(steps, programs, order, segment, record, stacks, carried, shared, given, tasks, cut, parts, made, sources, last,
//        sums) -> what `play` takes: see `Replay`. Of tensors only the forms matter; `tasks` is 0 if each has its state.
PyObject* make_replay(PyObject* given) {
  auto replay = std::make_unique<Replay>();
  replay->loop = loop_of(item(given, 0), item(given, 1), item(given, 2), item(given, 3));
  replay->record = integer(item(given, 4)), replay->stacks = integer(item(given, 5));
  replay->carried = integer(item(given, 6)), replay->shared = integer(item(given, 7));
  replay->given = forms_of(values(item(given, 8)));
  const int64_t tasks = integer(item(given, 9));
  for (size_t index = 0; tasks && index < replay->carried; ++index) {
    Places sizes = replay->given[index].sizes;
    sizes.insert(sizes.begin(), tasks);
    replay->led.push_back(row_major(replay->given[index].dtype, std::move(sizes)));
  }
  replay->cut = integer(item(given, 10)), replay->parts = forms_of(values(item(given, 11)));
  replay->made = places(item(given, 12)), replay->sources = places(item(given, 13));
  replay->last = forms_of(values(item(given, 14))), replay->sums = forms_of(values(item(given, 15)));
  return capsule_of(std::move(replay), REPLAY);
}

// What calls like an earlier one are given: tensors of these forms, or it does not fit.
template <typename FormAt>
Values given_values(PyObject* capsules, size_t count, bool& fits, FormAt form_at) {
  static const Form none;
  size_t index = 0;
  Values all = read_all<Value>(capsules, [&](PyObject* capsule) {
    void* pointer = PyCapsule_GetPointer(capsule, nullptr);
    if (!pointer) throw PythonError();
    const Form& form = index < count ? form_at(index) : none;
    ++index;
    return given_as(static_cast<AtenTensorHandle>(pointer), form, fits);
  });
  fits &= index == count;
  return all;
}

// play(replay, given) -> None, if something has another form or a condition does not hold; else (results, kept, tape):
// what is carried on, then what the steps returned; and the places of what the tape shares with Python.
PyObject* play(PyObject* given) {
  const Replay& replay = in_capsule<const Replay>(item(given, 0), REPLAY);
  bool fits = true;
  auto form_at = [&](size_t index) -> const Form& { return replay.given[index]; };
  const Values all = given_values(item(given, 1), replay.given.size(), fits, form_at);
  if (!fits) Py_RETURN_NONE;
  auto tape = std::make_unique<Tape>();
  Outcome outcome;
  {
    const WithoutGil released;
    outcome = run_again(replay, all, *tape);
  }
  if (!outcome.held) Py_RETURN_NONE;
  Object results = list(), kept = list();
  for (auto place : replay.made) append(results.get(), copy_of(outcome.carried[place]));
  for (size_t place = 0; place < outcome.returned[0].size(); ++place) {
    append(results.get(), replay.stacks ? stacked(outcome.returned, place) : copy_of(outcome.returned[0][place]));
  }
  outcome = Outcome();
  for (size_t place = 0; place < all.size(); ++place) {
    if (all[place].get().block->owners.load() < 2) continue;
    Object number(PyLong_FromSize_t(place), Py_DecRef);
    if (!number || PyList_Append(kept.get(), number.get())) throw PythonError();
  }
  return Py_BuildValue("(NNN)", results.release(), kept.release(), capsule_of(std::move(tape), TAPE));
}

// play_back(replay, tape, last, returned) -> the adjoints of what is differentiated, from those of the results
PyObject* play_back(PyObject* given) {
  const Replay& replay = in_capsule<const Replay>(item(given, 0), REPLAY);
  const Tape& tape = in_capsule<const Tape>(item(given, 1), TAPE);
  const Values last = values(item(given, 2)), returned = values(item(given, 3));
  Values found;
  {
    const WithoutGil released;
    found = back_again(replay, tape, last, returned);
  }
  Object tensors = list();
  append_all(tensors.get(), found);
  return tensors.release();
}

// gradient(loop, loss, routes, through, seed) -> what `play_gradient` takes: see `Gradient`. Both replays have to outlive it.
PyObject* make_gradient(PyObject* given) {
  const Replay& loop = in_capsule<const Replay>(item(given, 0), REPLAY);
  const Replay& loss = in_capsule<const Replay>(item(given, 1), REPLAY);
  auto made = std::make_unique<Gradient>(loop, loss, places(item(given, 2)), places(item(given, 3)), value_of(item(given, 4)));
  return capsule_of(std::move(made), GRADIENT);
}

// play_gradient(gradient, given) -> [loss, adjoints...]; None if something that is given has another form or a condition
// does not hold; False if what the programs gave has
PyObject* play_gradient(PyObject* given) {
  const Gradient& gradient = in_capsule<const Gradient>(item(given, 0), GRADIENT);
  bool fits = true;
  auto form_at = [&](size_t index) -> const Form& { return gradient.form(index); };
  const Values all = given_values(item(given, 1), gradient.given(), fits, form_at);
  if (!fits) Py_RETURN_NONE;
  Gradients made;
  {
    const WithoutGil released;
    made = gradients_of(gradient, all);
  }
  if (made.how == Gradients::OTHER_CONDITIONS) Py_RETURN_NONE;
  if (made.how == Gradients::OTHER_FORMS) Py_RETURN_FALSE;
  Object tensors = list();
  append(tensors.get(), copy_of(made.loss));
  append_all(tensors.get(), made.found);
  return tensors.release();
}

// call(program, inputs, count) -> results: calls one program
PyObject* call_program(PyObject* given) {
  const auto program = reinterpret_cast<Entry>(integer(item(given, 0)));
  Values inputs = values(item(given, 1));
  Object results = list();
  append_all(results.get(), call(program, std::move(inputs), integer(item(given, 2))));
  return results.release();
}

// runtime() -> where programs get memory from
PyObject* runtime_address(PyObject*) { return PyLong_FromVoidPtr(const_cast<Runtime*>(&here)); }

// empty() -> None; what the pool keeps goes back to torch
PyObject* empty_pool(PyObject*) {
  pool().empty();
  Py_RETURN_NONE;
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
                         {"call", guarded<call_program>, METH_VARARGS, "Calls one program."},
                         {"runtime", guarded<runtime_address>, METH_VARARGS, "Returns where programs get memory from."},
                         {"replay", guarded<make_replay>, METH_VARARGS, "Returns the tables of a loop for `play`."},
                         {"play", guarded<play>, METH_VARARGS, "Runs a loop like one that ran before."},
                         {"play_back", guarded<play_back>, METH_VARARGS, "Runs its adjoints."},
                         {"gradient", guarded<make_gradient>, METH_VARARGS, "Returns the tables for `play_gradient`."},
                         {"play_gradient", guarded<play_gradient>, METH_VARARGS, "Runs a loop, a loss, and adjoints."},
                         {"contents", guarded<contents>, METH_VARARGS, "Returns the tensors of a tape."},
                         {"empty", guarded<empty_pool>, METH_VARARGS, "Gives back to torch what the pool keeps."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "loop_driver", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_loop_driver() { return PyModule_Create(&definition); }
