// Loops like one that ran before, straight from the tensors of a call (loop_driver.cpp; replays.py).
//
// What was checked and arranged in Python then is a table here: the forms that the tensors had, and where each goes.

namespace {

// What a tensor has to be like; its elements lie one after the other.
struct Form {
  int32_t dtype = -1;  // -1: there is none
  Places sizes, strides;

  int64_t count() const {
    int64_t made = 1;
    for (auto size : sizes) made *= size;
    return made;
  }
  explicit operator bool() const { return dtype >= 0; }
};

using Forms = std::vector<Form>;

Form row_major(int32_t dtype, Places sizes) {
  Form form{dtype, std::move(sizes), {}};
  form.strides.resize(form.sizes.size());
  int64_t count = 1;
  for (size_t dim = form.sizes.size(); dim-- > 0;) form.strides[dim] = count, count *= form.sizes[dim];
  return form;
}

Form form_of(const Value& value) {
  if (!value) return Form();
  const Handle& one = value;
  return row_major(one.dtype, Places(one.sizes, one.sizes + one.dims));
}

Forms forms_of(const Values& values) {
  Forms made;
  for (const auto& value : values) made.push_back(form_of(value));
  return made;
}

Value made_like(const Form& form) {
  Handle made{nullptr, nullptr, form.sizes.data(), form.strides.data(), static_cast<int32_t>(form.sizes.size()), form.dtype};
  made.block = runtime->allocate(form.count() * item_size(form.dtype));
  made.data = made.block->data;
  return Value(made);
}

Value zeros_of(const Form& form) {
  if (!form) return Value();
  Value made = made_like(form);
  std::memset(made.data_ptr(), 0, form.count() * item_size(form.dtype));
  return made;
}

struct Replay {
  Loop loop;
  bool record, stacks;     // stacks: what the steps returned is stacked; else it is what the only step returned
  size_t carried, shared;  // how many there are of what is given, before the batches
  Forms given;
  Forms led;     // of what is carried, for all tasks; none if it is given so
  int64_t cut;   // the dimension of the steps in the batches that are given; -1: they are given step by step
  Forms parts;   // of the batch of one step
  Places made;   // which of what the last step carries on are results
  Places sources;  // which of what is given are differentiated
  Forms last, sums;  // of the adjoints of what the last step carries on, and of what is shared
};

// ------------------------------------------------------------------------------------------------------------- forward

// Takes a tensor of torch, and tells whether it is of a form; where it is not, it is let go.
Value given_as(AtenTensorHandle tensor, const Form& form, bool& fits) {
  int32_t layout, device;
  bool contiguous = false;
  check(aoti_torch_get_layout(tensor, &layout));
  check(aoti_torch_get_device_type(tensor, &device));
  if (layout == aoti_torch_layout_strided() && device == aoti_torch_device_type_cpu()) {
    check(aoti_torch_is_contiguous(tensor, &contiguous));
  }
  if (!contiguous) {
    fits = false;
    aoti_torch_delete_tensor_object(tensor);
    return Value();
  }
  Value made = given_value(tensor, true);
  const Handle& one = made;
  fits &= one.dtype == form.dtype && std::equal(one.sizes, one.sizes + one.dims, form.sizes.begin(), form.sizes.end());
  return made;
}

// One copy for each task.
Value for_tasks(const Value& one, const Form& form) {
  Value made = made_like(form);
  const int64_t bytes = form.count() / std::max<int64_t>(form.sizes[0], 1) * item_size(form.dtype);
  for (int64_t task = 0; task < form.sizes[0]; ++task) {
    std::memcpy(static_cast<char*>(made.data_ptr()) + task * bytes, one.get().data, bytes);
  }
  return made;
}

// One step of batches that lead with tasks, then steps.
Value cut_out(const Value& all, const Form& form, int64_t step) {
  Value made = made_like(form);
  const Handle& from = all;
  const int64_t tasks = from.sizes[0], steps = from.sizes[1];
  const int64_t bytes = tasks ? form.count() / tasks * item_size(form.dtype) : 0;
  for (int64_t task = 0; task < tasks; ++task) {
    std::memcpy(static_cast<char*>(made.data_ptr()) + task * bytes, from.data + (task * steps + step) * bytes, bytes);
  }
  return made;
}

Value part_of(const Replay& replay, const Values& batches, size_t step, size_t leaf) {
  const size_t leaves = replay.parts.size();
  if (replay.cut < 0) return batches[step * leaves + leaf].share();
  if (replay.cut == 0) return at_step(batches[leaf], step);
  return cut_out(batches[leaf], replay.parts[leaf], step);
}

Outcome run_again(const Replay& replay, const Values& given, Tape& tape) {
  const auto shared_from = given.begin() + replay.carried, batches_from = shared_from + replay.shared;
  Values carried, shared, batches;
  for (auto one = given.begin(); one != shared_from; ++one) {
    const size_t index = one - given.begin();
    carried.push_back(replay.led.empty() ? one->share() : for_tasks(*one, replay.led[index]));
  }
  for (auto one = shared_from; one != batches_from; ++one) shared.push_back(one->share());
  for (auto one = batches_from; one != given.end(); ++one) batches.push_back(one->share());
  std::vector<Values> rest(replay.loop.order.size());
  for (size_t step = 0; step < rest.size(); ++step) {
    for (size_t leaf = 0; leaf < replay.parts.size(); ++leaf) rest[step].push_back(part_of(replay, batches, step, leaf));
  }
  Outcome outcome = run_steps(replay.loop, 0, rest.size(), carried, shared, rest, replay.record ? &tape.kept : nullptr,
                              replay.loop.segment != 0);
  if (replay.record && replay.loop.segment) tape.shared = std::move(shared), tape.rest = std::move(rest);
  return outcome;
}

// ------------------------------------------------------------------------------------------------------------ backward

// The sum over tasks, in double precision until the end.
template <typename Element>
void add_tasks(const Element* from, Element* to, int64_t tasks, int64_t count) {
  constexpr int64_t CHUNK = 512;
  double sums[CHUNK];
  for (int64_t first = 0; first < count; first += CHUNK) {
    const int64_t width = std::min(CHUNK, count - first);
    std::fill(sums, sums + width, 0.0);
    for (int64_t task = 0; task < tasks; ++task) {
      const Element* row = from + task * count + first;
      for (int64_t index = 0; index < width; ++index) sums[index] += row[index];
    }
    for (int64_t index = 0; index < width; ++index) to[first + index] = static_cast<Element>(sums[index]);
  }
}

Value over_tasks(const Value& all, const Form& form) {
  Value made = made_like(form);
  const Handle &from = all, &to = made;
  const int64_t tasks = from.sizes[0], count = form.count();
  if (form.dtype == aoti_torch_dtype_float64()) {
    add_tasks(reinterpret_cast<const double*>(from.data), reinterpret_cast<double*>(to.data), tasks, count);
  } else if (form.dtype == aoti_torch_dtype_float32()) {
    add_tasks(reinterpret_cast<const float*>(from.data), reinterpret_cast<float*>(to.data), tasks, count);
  } else {
    throw std::runtime_error("a compiled loop adds up the adjoints of tasks in float32 and float64 only");
  }
  return made;
}

// The adjoints of what is differentiated, from those of the results; none stands for zero.
Values back_again(const Replay& replay, const Tape& tape, const Values& last, const Values& returned) {
  Adjoints adjoints;
  for (const auto& form : replay.last) adjoints.carried.push_back(zeros_of(form));
  for (size_t index = 0; index < replay.made.size(); ++index) {
    if (last[index]) adjoints.carried[replay.made[index]] = last[index].share();
  }
  for (const auto& form : replay.sums) adjoints.shared.push_back(zeros_of(form));
  for (size_t index = 0; index < replay.loop.order.size(); ++index) adjoints.batches.emplace_back(replay.parts.size());
  run_back(replay.loop, tape, returned, adjoints);
  Values found;
  for (size_t source : replay.sources) {
    if (source >= replay.carried) {
      found.push_back(adjoints.shared[source - replay.carried].share());
    } else if (const Value& value = adjoints.carried[source]; value && !replay.led.empty()) {
      found.push_back(over_tasks(value, replay.given[source]));
    } else {
      found.push_back(value.share());
    }
  }
  return found;
}

}  // namespace
