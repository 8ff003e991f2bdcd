// The loop over compiled steps, without Python between them: what `loop.py` does in Python, on the same tables.
//
// A step's programs are functions of libraries (lean_program.h). They take handles, which they own from then on, and
// give handles. Tensors of torch come from Python, and go back, as handles of torch in capsules.

#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "lean_runtime.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

using gimli::Block;
using gimli::extent;
using gimli::Handle;
using gimli::item_size;
using gimli::Runtime;
using Entry = void (*)(Handle*, Handle*);
using Places = std::vector<int64_t>;
using Pairs = std::vector<std::pair<int64_t, int64_t>>;

struct PythonError {};  // Python already knows

void check(int32_t code) {
  if (code != AOTI_TORCH_SUCCESS) throw std::runtime_error("a call of torch failed in the loop of compiled steps");
}

// ------------------------------------------------------------------------------------------------------------- memory

// Keeps what is let go for the next that need as much: in small loops, allocation is most of the work.
class Pool {
 public:
  Block* allocate(size_t bytes) {
    const size_t kind = kind_of(bytes);
    if (kind < KINDS) {
      const Lock lock(busy_);
      if (Block* found = free_[kind]) {
        free_[kind] = found->next;
        kept_ -= found->size;
        found->owners.store(1, std::memory_order_relaxed);
        return found;
      }
    }
    return make(kind < KINDS ? size_of(kind) : bytes);
  }

  void release(Block* block) {
    const size_t kind = block->given ? KINDS : kind_of(block->size);
    if (kind < KINDS) {
      const Lock lock(busy_);
      if (kept_ + block->size <= LIMIT) {
        kept_ += block->size;
        block->next = free_[kind];
        free_[kind] = block;
        return;
      }
    }
    aoti_torch_delete_tensor_object(static_cast<AtenTensorHandle>(block->tensor));
    delete block;
  }

 private:
  static constexpr size_t KINDS = 96, FINE = 64, UNIT = 64;  // multiples of 64 bytes to 4 KiB; then 4 for each doubling
  static constexpr size_t LIMIT = 32 << 20;                  // bytes that are kept

  struct Lock {
    explicit Lock(std::atomic_flag& busy) : busy_(busy) {
      while (busy_.test_and_set(std::memory_order_acquire)) {
      }
    }
    ~Lock() { busy_.clear(std::memory_order_release); }
    std::atomic_flag& busy_;
  };

  static size_t size_of(size_t kind) {
    if (kind < FINE) return UNIT * (kind + 1);
    const size_t above = kind - FINE;
    return (UNIT * FINE / 4 * (5 + above % 4)) << (above / 4);
  }

  static size_t kind_of(size_t bytes) {
    if (bytes <= UNIT * FINE) return bytes ? (bytes - 1) / UNIT : 0;
    size_t kind = FINE;
    while (kind < KINDS && size_of(kind) < bytes) ++kind;
    return kind;
  }

  static Block* make(size_t bytes) {
    const int64_t size = bytes, stride = 1;
    AtenTensorHandle tensor;
    check(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), 0, &tensor));
    void* data;
    check(aoti_torch_get_data_ptr(tensor, &data));
    return new Block{{1}, bytes, static_cast<char*>(data), tensor, false, false, nullptr};
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  Block* free_[KINDS] = {};
  size_t kept_ = 0;
};

Pool& pool() {
  static Pool& made = *new Pool;  // outlives what lets go of memory when the process ends
  return made;
}

const Runtime here{[](size_t bytes) { return pool().allocate(bytes); }, [](Block* block) { pool().release(block); }};
const Runtime* const runtime = &here;

// ------------------------------------------------------------------------------------------------------------- tensors

using Value = gimli::OwnedBy<&runtime>;

Value empty_like(const Handle& like) {
  Handle made = like;
  made.block = runtime->allocate(extent(like) * item_size(like.dtype));
  made.data = made.block->data;
  return Value(made);
}

Value zeros_like(const Handle& like) {
  Value made = empty_like(like);
  std::memset(made.data_ptr(), 0, extent(like) * item_size(like.dtype));
  return made;
}

// A tensor of torch, which is owned from then on.
Value given_value(AtenTensorHandle tensor, bool watched = false) {
  Handle made{};
  int64_t dims, *sizes, *strides;
  void* data;
  check(aoti_torch_get_dim(tensor, &dims));
  check(aoti_torch_get_sizes(tensor, &sizes));
  check(aoti_torch_get_strides(tensor, &strides));
  check(aoti_torch_get_dtype(tensor, &made.dtype));
  check(aoti_torch_get_data_ptr(tensor, &data));
  made.sizes = sizes, made.strides = strides, made.dims = static_cast<int32_t>(dims);
  made.data = static_cast<char*>(data);
  made.block = new Block{{1}, 0, made.data, tensor, true, watched, nullptr};
  return Value(made);
}

// A tensor of torch: the one that was given, or a copy.
AtenTensorHandle torch_tensor(const Handle& value) {
  AtenTensorHandle made;
  if (value.block->given && value.data == value.block->data) {
    int64_t* sizes;
    const auto tensor = static_cast<AtenTensorHandle>(value.block->tensor);
    check(aoti_torch_get_sizes(tensor, &sizes));
    if (sizes == value.sizes) {
      check(aoti_torch_new_tensor_handle(tensor, &made));
      return made;
    }
  }
  check(aoti_torch_empty_strided(value.dims, value.sizes, value.strides, value.dtype, aoti_torch_device_type_cpu(), 0, &made));
  void* data;
  check(aoti_torch_get_data_ptr(made, &data));
  std::memcpy(data, value.data, extent(value) * item_size(value.dtype));
  return made;
}

Value sum_of(const Handle& first, const Handle& second) {
  AtenTensorHandle parts[2], made;
  const Handle* given[] = {&first, &second};
  for (int index = 0; index < 2; ++index) {
    const Handle& one = *given[index];
    check(aoti_torch_create_tensor_from_blob(one.data, one.dims, one.sizes, one.strides, 0, one.dtype,
                                             aoti_torch_device_type_cpu(), 0, &parts[index]));
  }
  const auto code = aoti_torch_cpu_add_Tensor(parts[0], parts[1], 1.0, &made);
  for (auto part : parts) aoti_torch_delete_tensor_object(part);
  check(code);
  return given_value(made);
}

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

// Runs the steps from `first` to `end`; keeps their residuals, or with segments their boundaries, if there is a `kept`.
Outcome run_steps(const Loop& loop, size_t first, size_t end, const Values& start, const Values& shared,
                  const std::vector<Values>& rest, std::vector<Values>* kept, bool boundaries) {
  Outcome outcome;
  outcome.carried = share(start);
  const bool saves = kept && !boundaries;
  for (size_t index = first; index < end; ++index) {
    const Step& step = loop.step(index);
    if (kept && boundaries && loop.starts_segment(index)) kept->push_back(share(outcome.carried));
    const Available pool = available(outcome.carried, shared, rest[index]);
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
    Values now;
    for (const auto& all : returned) now.push_back(at_step(all, index));
    step_back(step, loop.at(index).backward, std::move(residuals), now, adjoints, adjoints.batches[index]);
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
                         {"contents", guarded<contents>, METH_VARARGS, "Returns the tensors of a tape."},
                         {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "loop_driver", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_loop_driver() { return PyModule_Create(&definition); }
