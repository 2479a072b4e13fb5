// What looks at Python's tensors: plans of lists and calls on rows; long, as both share one way of reading a tensor.
#include "tensors.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

namespace fastpost {

namespace {

// -- DLPack, version 1 ----------------------------------------------------------------------------------------------------
//
// The part of its C interface that is used here; the layout is fixed by the protocol.

struct DLDevice {
  int32_t type, id;
};

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*destroy)(DLManagedTensor*);
  uint64_t flags;
  DLTensor tensor;
};

struct DLPackTable {
  uint32_t major, minor;
  const DLPackTable* previous;
  void* allocate;
  void* from_python;
  int (*to_python)(DLManagedTensor* tensor, void** out);
  int (*borrow)(void* tensor, DLTensor* out);
  void* current_stream;
};

Torch torch;
const DLPackTable* table = nullptr;

constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;
constexpr DLDevice kCpu{1, 0};
constexpr DLDataType kDouble{2, 64, 1}, kFloat{2, 32, 1}, kHalf{2, 16, 1}, kBFloat{4, 16, 1}, kLong{0, 64, 1},
    kBool{6, 8, 1};
constexpr int kMostDoubles = 6;  // the sums of a perturbation
constexpr Py_ssize_t kMostArguments = 15;

// An attribute, or what a method without arguments returns, as an integer; false with a cleared error where there is none.
bool as_integer(const Ref& object, int64_t& value) {
  if (object) value = PyLong_AsLongLong(object.get());
  if (PyErr_Occurred() == nullptr) return static_cast<bool>(object);
  PyErr_Clear();
  return false;
}

// Whether anything but False was returned; a failed call has not said no.
bool is_true(const Ref& returned) {
  if (!returned) PyErr_Clear();
  return returned.get() != Py_False;
}

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// An attribute of tensors that are plain ones. Looking it up takes as long as reading it, so it is looked up once.
class Attribute {
 public:
  explicit Attribute(const char* text) : name_(name(text)), found_(PyObject_GetAttr(torch.plain.front(), name_)) {
    if (!found_) PyErr_Clear();
    if (found_ && Py_IS_TYPE(found_.get(), &PyGetSetDescr_Type))
      descriptor_ = reinterpret_cast<PyGetSetDescrObject*>(found_.get())->d_getset;
  }
  Ref of(PyObject* tensor) const {
    return Ref(descriptor_ != nullptr ? descriptor_->get(tensor, descriptor_->closure) : PyObject_GetAttr(tensor, name_));
  }

 private:
  PyObject* name_;
  Ref found_;
  const PyGetSetDef* descriptor_ = nullptr;
};

// A method without arguments of tensors that are plain ones.
Ref call_method(PyObject* method, PyObject* tensor) {
  if (Py_IS_TYPE(method, &PyMethodDescr_Type)) {
    const PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(method)->d_method;
    if (definition->ml_flags == METH_NOARGS) return Ref(definition->ml_meth(tensor, nullptr));
  }
  return Ref(PyObject_CallOneArg(method, tensor));
}

bool is_plain(PyObject* tensor) {
  const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return std::find(torch.plain.begin(), torch.plain.end(), type) != torch.plain.end();
}

const Attribute& requires_grad() {
  static const Attribute attribute("requires_grad");
  return attribute;
}

const Attribute& gradient() {
  static const Attribute attribute("grad");
  return attribute;
}

// Appends a tuple of integers.
bool append(const Ref& tuple, std::vector<int64_t>& sizes) {
  const bool usable = tuple && PyTuple_Check(tuple.get());
  for (Py_ssize_t d = 0; usable && d < PyTuple_GET_SIZE(tuple.get()); ++d)
    sizes.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.get(), d)));
  if (PyErr_Occurred() == nullptr) return usable;
  PyErr_Clear();
  return false;
}

constexpr int64_t key(DLDataType dtype) { return int64_t{dtype.code} << 32 | int64_t{dtype.bits} << 16 | dtype.lanes; }

constexpr int64_t key(DLDevice device) { return int64_t{device.type} << 32 | static_cast<uint32_t>(device.id); }

// -- one tensor -----------------------------------------------------------------------------------------------------------

bool observed() {
  return std::any_of(torch.observers.begin(), torch.observers.end(), [](PyObject* observer) {
    const Ref returned(PyObject_CallNoArgs(observer));
    if (!returned) PyErr_Clear();
    return !returned || PyObject_IsTrue(returned.get()) != 0;
  });
}

bool recording() { return is_true(Ref(PyObject_CallNoArgs(torch.grad_enabled))); }

// Of the first of the plain classes, from which all others come.
bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(torch.plain.front())) != 0;
}

bool read_attributes(PyObject* tensor, TensorLayout& layout) {
  static PyObject *const data_ptr = name("data_ptr"), *const dtype = name("dtype"), *const device = name("device"),
                         *const itemsize = name("itemsize"), *const shape = name("shape"), *const stride = name("stride");
  int64_t address = 0;
  if (!as_integer(Ref(PyObject_CallMethodNoArgs(tensor, data_ptr)), address)) return false;
  layout.address = static_cast<uintptr_t>(address);
  if (!as_integer(Ref(PyObject_GetAttr(tensor, itemsize)), layout.itemsize)) return false;
  const Ref kind(PyObject_GetAttr(tensor, dtype));  // there is one object per dtype
  layout.dtype = reinterpret_cast<int64_t>(kind.get());
  const Ref place(PyObject_GetAttr(tensor, device));  // whose hash is made of its type and index
  layout.device = place ? PyObject_Hash(place.get()) : -1;
  thread_local std::vector<int64_t> sizes;
  sizes.clear();
  if (!append(Ref(PyObject_GetAttr(tensor, shape)), sizes)) return false;
  layout.dimensions = static_cast<int64_t>(sizes.size());
  if (!append(Ref(PyObject_CallMethodNoArgs(tensor, stride)), sizes)) return false;
  layout.shape = sizes.data();
  layout.strides = sizes.data() + layout.dimensions;
  return static_cast<int64_t>(sizes.size()) == 2 * layout.dimensions;
}

// Whether the tensor is to be read with its sign turned. Asking takes longer than all else, and lets other threads run.
bool is_negative(PyObject* tensor) { return is_true(call_method(torch.is_neg, tensor)); }

// As `read`, for a tensor that is known not to be read with its sign turned, or still to be asked.
bool read_layout(PyObject* tensor, bool recorded, TensorLayout& layout) {
  if (!is_plain(tensor)) return false;
  if (recorded && is_true(requires_grad().of(tensor))) return false;
  if (table == nullptr) {
    if (!read_attributes(tensor, layout)) return false;
  } else {
    DLTensor seen;
    if (table->borrow(tensor, &seen) != 0) {
      PyErr_Clear();
      return false;
    }
    layout.address = reinterpret_cast<uintptr_t>(seen.data) + seen.byte_offset;
    layout.dtype = key(seen.dtype);
    layout.device = key(seen.device);
    layout.itemsize = (int64_t{seen.dtype.bits} * seen.dtype.lanes + 7) / 8;
    layout.dimensions = seen.ndim;
    layout.shape = seen.shape;
    layout.strides = seen.strides;
  }
  const int64_t* end = layout.shape + layout.dimensions;
  return layout.address != 0 || std::find(layout.shape, end, 0) != end;
}

// False where the tensor is no plain one, is to be read with its sign turned, has elements but no memory of its own
// (wrappers of torch's transformations), or, if `recorded`, requires a gradient.
bool read(PyObject* tensor, bool recorded, TensorLayout& layout) {
  return read_layout(tensor, recorded, layout) && !is_negative(tensor);
}

// Bytes from the first element to the end of the last; 0 where there are none.
uintptr_t extent(const TensorLayout& layout) {
  int64_t elements = 1;
  for (int64_t d = 0; d < layout.dimensions; ++d) {
    if (layout.shape[d] == 0) return 0;
    elements += (layout.shape[d] - 1) * layout.strides[d];
  }
  return static_cast<uintptr_t>(elements * layout.itemsize);
}

}  // namespace

void attach(Torch given) {
  torch = std::move(given);
  table = nullptr;
  if (!PyCapsule_IsValid(torch.exchange, kCapsule)) return;
  table = static_cast<const DLPackTable*>(PyCapsule_GetPointer(torch.exchange, kCapsule));
  while (table != nullptr && table->major != kMajor) table = table->previous;
}

bool needs_dispatcher(PyObject* arguments) {
  if (observed()) return true;
  const bool recorded = recording();
  TensorLayout layout;
  const auto plain = [&](PyObject* argument) { return !is_tensor(argument) || read(argument, recorded, layout); };
  for (Py_ssize_t i = 0; i < PyTuple_Size(arguments); ++i) {
    PyObject* argument = PyTuple_GET_ITEM(arguments, i);
    if (!plain(argument)) return true;
    for (Py_ssize_t row = 0; PyList_Check(argument) && row < PyList_GET_SIZE(argument); ++row)
      if (!plain(PyList_GET_ITEM(argument, row))) return true;
  }
  return false;
}

namespace {

// An error that was set, kept aside while other calls are made.
class KeptError {
 public:
  KeptError() { PyErr_Fetch(&type_, &value_, &trace_); }
  ~KeptError() {
    Py_XDECREF(type_);
    Py_XDECREF(value_);
    Py_XDECREF(trace_);
  }
  KeptError(const KeptError&) = delete;
  KeptError& operator=(const KeptError&) = delete;
  void restore() {
    PyErr_Restore(std::exchange(type_, nullptr), std::exchange(value_, nullptr), std::exchange(trace_, nullptr));
  }

 private:
  PyObject *type_ = nullptr, *value_ = nullptr, *trace_ = nullptr;
};

// Autograd records from now on, or does not; false with an error where that has failed. No mode of torch sees it, whose
// Python could raise before or after it is done.
bool record(bool on) {
  static PyObject *const enter = name("__enter__"), *const leave = name("__exit__");
  Ref unseen;
  const Ref modes(PyObject_CallNoArgs(torch.function_modes));
  if (!modes) return false;
  if (PyObject_IsTrue(modes.get()) != 0) {
    unseen = Ref(PyObject_CallNoArgs(torch.past_modes));
    if (!unseen || !Ref(PyObject_CallMethodNoArgs(unseen.get(), enter))) return false;
  }
  const bool done(Ref(PyObject_CallOneArg(torch.set_grad_enabled, on ? Py_True : Py_False)));
  if (!unseen) return done;
  KeptError error;
  if (!Ref(PyObject_CallMethodObjArgs(unseen.get(), leave, Py_None, Py_None, Py_None, nullptr))) return false;
  error.restore();
  return done;
}

}  // namespace

PyObject* without_grad(PyObject* function, PyObject* arguments, PyObject* keywords) {
  const bool recorded = recording();
  if (recorded && !record(false)) return nullptr;
  Ref result(PyObject_Call(function, arguments, keywords));
  if (!recorded) return result.release();
  KeptError error;
  if (!record(true)) return nullptr;
  error.restore();
  return result.release();
}

bool number(PyObject* object, double& value) {
  TensorLayout layout;
  if (table != nullptr && read(object, false, layout) && layout.dimensions == 0 && layout.dtype == key(kDouble) &&
      layout.device == key(kCpu)) {
    std::memcpy(&value, reinterpret_cast<const void*>(layout.address), sizeof value);
    return true;
  }
  value = PyFloat_AsDouble(object);
  return PyErr_Occurred() == nullptr;
}

bool whole_number(PyObject* tensor, uint64_t& value) {
  static PyObject* const item = name("item");
  const Ref found(PyObject_CallMethodNoArgs(tensor, item));
  if (found) value = PyLong_AsUnsignedLongLongMask(found.get());
  return PyErr_Occurred() == nullptr;
}

bool dtype_named(PyObject* object, DType& dtype) {
  const auto found = std::find(torch.dtypes.begin(), torch.dtypes.end(), object);
  if (found == torch.dtypes.end()) {
    PyErr_Format(PyExc_TypeError, "the CPU's kernels compute nothing in %R", object);
    return false;
  }
  dtype = static_cast<DType>(found - torch.dtypes.begin());
  return true;
}

int num_threads() {
  const Ref found(PyObject_CallNoArgs(torch.num_threads));
  const long threads = found ? PyLong_AsLong(found.get()) : 0;
  return threads < 1 ? 0 : static_cast<int>(threads);
}

namespace {

// A tensor on the CPU that owns its values; a scalar where there is one.
template <class T>
PyObject* owning_tensor(const T* values, int count, DLDataType dtype) {
  struct Owned {
    DLManagedTensor managed;
    int64_t shape, stride;
    T values[kMostDoubles];
  };
  Owned* owned = new Owned{};
  owned->shape = count;
  owned->stride = 1;
  std::copy(values, values + count, owned->values);
  const auto destroy = [](DLManagedTensor* managed) { delete reinterpret_cast<Owned*>(managed); };
  const DLTensor tensor{owned->values, kCpu, count == 1 ? 0 : 1, dtype, &owned->shape, &owned->stride, 0};
  owned->managed = {kMajor, 0, nullptr, destroy, 0, tensor};
  void* made = nullptr;
  if (table->to_python(&owned->managed, &made) != 0) return nullptr;
  return static_cast<PyObject*>(made);
}

}  // namespace

PyObject* float64_tensor(const double* values, int count) {
  if (table == nullptr) {
    const Ref given(count == 1 ? PyFloat_FromDouble(*values) : PyTuple_New(count));
    for (int i = 0; given && count != 1 && i < count; ++i) PyTuple_SET_ITEM(given.get(), i, PyFloat_FromDouble(values[i]));
    return given ? PyObject_CallOneArg(torch.float64_tensor, given.get()) : nullptr;
  }
  return owning_tensor(values, count, kDouble);
}

PyObject* float32_scalar(double value) {
  const float rounded = static_cast<float>(value);
  return owning_tensor(&rounded, 1, kFloat);
}

// -- rows of logits -------------------------------------------------------------------------------------------------------

namespace {

bool dtype_of(const TensorLayout& layout, DType& dtype) {
  dtype = layout.dtype == key(kBFloat) ? DType::bf16 : layout.dtype == key(kHalf) ? DType::f16 : DType::f32;
  return dtype != DType::f32 || layout.dtype == key(kFloat);
}

// Of a tensor with at least one dimension, the rows of its last one, if they lie at one distance.
bool rows_of(PyObject* tensor, TensorLayout& layout, LogitRows& block) {
  if (!read(tensor, false, layout) || layout.dimensions == 0) return false;
  const int64_t last = layout.dimensions - 1;
  if (layout.shape[last] == 0 || (layout.strides[last] != 1 && layout.shape[last] != 1)) return false;
  block = {reinterpret_cast<void*>(layout.address), layout.shape[last]};
  int64_t distance = 0, length = 1;  // of the dimensions walked so far
  for (int64_t d = last - 1; d >= 0; --d) {
    if (layout.shape[d] == 1) continue;
    if (length == 1)
      block.stride = layout.strides[d];
    else if (layout.strides[d] != distance * length)
      return false;
    if (length == 1) distance = layout.strides[d];
    length *= layout.shape[d];
  }
  return length <= 1 || block.stride >= layout.shape[last];
}

// The values of a contiguous tensor beside the logits, one for each of their rows.
template <class T>
bool column_of(PyObject* tensor, const TensorLayout& logits, DLDataType dtype, const T*& values) {
  values = nullptr;
  if (tensor == Py_None) return true;
  TensorLayout layout;
  if (!read(tensor, false, layout) || layout.device != logits.device || layout.dtype != key(dtype)) return false;
  if (layout.dimensions != logits.dimensions - 1) return false;
  int64_t distance = 1;
  for (int64_t d = layout.dimensions - 1; d >= 0; --d) {
    if (layout.shape[d] != logits.shape[d] || (layout.shape[d] != 1 && layout.strides[d] != distance)) return false;
    distance *= layout.shape[d];
  }
  values = reinterpret_cast<const T*>(layout.address);
  return true;
}

// Whether both streams share an element; rows of one stride may lie between each other.
bool overlap(const RowTensors& t) {
  const auto begin = [&](const LogitRows& block) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(block.address)) / element_size(t.dtype);
  };
  const int64_t apart = std::abs(begin(t.clean) - begin(t.noised)), stride = t.clean.stride;
  if (t.rows == 1 || stride != t.noised.stride) return apart < (t.rows - 1) * std::max(stride, t.noised.stride) + t.cols;
  return apart < (t.rows - 1) * stride + t.cols && !(t.cols <= apart % stride && apart % stride <= stride - t.cols);
}

}  // namespace

bool read_rows(PyObject* clean, PyObject* noised, PyObject* labels, PyObject* mask, PyObject* grad_clean,
               PyObject* grad_noised, RowTensors& tensors) {
  if (table == nullptr || observed()) return false;
  tensors = {};
  TensorLayout like;
  if (!rows_of(clean, like, tensors.clean) || !dtype_of(like, tensors.dtype)) return false;
  const int64_t last = like.dimensions - 1;
  const auto same = [&](PyObject* other, LogitRows& block) {
    TensorLayout layout;
    return rows_of(other, layout, block) && layout.dtype == like.dtype && layout.device == like.device &&
           layout.dimensions == like.dimensions && std::equal(like.shape, like.shape + like.dimensions, layout.shape);
  };
  tensors.cols = like.shape[last];
  tensors.rows = 1;
  for (int64_t d = 0; d < last; ++d) tensors.rows *= like.shape[d];
  tensors.batch = last > 0 ? like.shape[0] : 1;
  const bool readable = same(noised, tensors.noised) && (grad_clean == Py_None || same(grad_clean, tensors.grad_clean)) &&
                        (grad_noised == Py_None || same(grad_noised, tensors.grad_noised)) && tensors.rows != 0 &&
                        column_of(labels, like, kLong, tensors.labels) && column_of(mask, like, kBool, tensors.mask);
  return readable && !(tensors.in_place() && overlap(tensors));
}

bool read_unrecorded_rows(PyObject* clean, PyObject* noised, PyObject* mask, RowTensors& tensors) {
  if (!read_rows(clean, noised, Py_None, mask, Py_None, Py_None, tensors)) return false;
  if (recording() && (is_true(requires_grad().of(clean)) || is_true(requires_grad().of(noised)))) return false;
  TensorLayout layout;
  return read_layout(clean, false, layout) && layout.device == key(kCpu);
}

bool read_gradients(PyObject* first, PyObject* second, PyObject* factor, RowTensors& tensors, const float*& by) {
  const bool two = second != Py_None;
  if (!read_rows(first, two ? second : first, Py_None, Py_None, Py_None, Py_None, tensors)) return false;
  std::swap(tensors.grad_clean, tensors.clean);
  if (two) std::swap(tensors.grad_noised, tensors.noised);
  TensorLayout gradient, scalar;
  if (!read(first, false, gradient)) return false;
  const int64_t device = gradient.device;
  if (!read(factor, false, scalar) || scalar.dimensions != 0) return false;
  by = reinterpret_cast<const float*>(scalar.address);
  return scalar.dtype == key(kFloat) && scalar.device == device;
}

// -- lists ----------------------------------------------------------------------------------------------------------------

// As `read`. A tensor that is held, and lies where it lay, has been asked before whether its sign is turned.
bool TensorLists::look(size_t index, PyObject* tensor, bool recorded, TensorLayout& layout) const {
  if (!read_layout(tensor, recorded, layout)) return false;
  const bool asked = index < held_.size() && held_[index] == tensor && addresses_[index] == layout.address;
  return asked || !is_negative(tensor);
}

// each(index over all columns, column, layout) for every tensor, until it returns false. False as well where the columns
// have other lengths than they had, or a tensor cannot be read.
template <class Visit>
bool TensorLists::visit(PyObject* columns, bool recorded, Visit&& each) const {
  if (!PyTuple_Check(columns) || PyTuple_GET_SIZE(columns) != static_cast<Py_ssize_t>(lengths_.size())) return false;
  size_t index = 0;
  for (size_t c = 0; c < lengths_.size(); ++c) {
    PyObject* list = PyTuple_GET_ITEM(columns, c);
    const int64_t length = list == Py_None ? -1 : PyList_Check(list) ? PyList_GET_SIZE(list) : -2;
    if (length != lengths_[c]) return false;
    TensorLayout layout;
    for (int64_t row = 0; row < length; ++row)
      if (!look(index, PyList_GET_ITEM(list, row), recorded, layout) || !each(index++, c, layout)) return false;
  }
  return true;
}

bool TensorLists::same_layout(const Known& known, const TensorLayout& layout) const {
  if (known.dtype != layout.dtype || known.device != layout.device || known.dimensions != layout.dimensions) return false;
  const int64_t *shape = &sizes_[known.sizes], *strides = shape + known.dimensions;
  bool same = true;
  for (int64_t d = 0; d < known.dimensions; ++d)
    same = same && shape[d] == layout.shape[d] && strides[d] == layout.strides[d];
  return same;
}

TensorLists::TensorLists(PyObject* columns, unsigned written, bool held) : written_(written), begins_{0} {
  for (Py_ssize_t c = 0; c < PyTuple_Size(columns); ++c) {
    PyObject* list = PyTuple_GET_ITEM(columns, c);
    lengths_.push_back(list == Py_None ? -1 : PyList_GET_SIZE(list));
    begins_.push_back(begins_.back() + static_cast<size_t>(std::max<int64_t>(lengths_.back(), 0)));
  }
  readable_ = visit(columns, false, [&](size_t, size_t, const TensorLayout& layout) {
    known_.push_back({layout.dtype, layout.device, layout.dimensions, sizes_.size(), extent(layout)});
    sizes_.insert(sizes_.end(), layout.shape, layout.shape + layout.dimensions);
    sizes_.insert(sizes_.end(), layout.strides, layout.strides + layout.dimensions);
    addresses_.push_back(layout.address);
    return true;
  });
  sizes_.push_back(0);  // so that there is a place to begin for scalars as well
  found_ = addresses_;
  shapes_.resize(found_.size());
  for (Py_ssize_t c = 0; held && readable_ && c < PyTuple_Size(columns); ++c) {
    PyObject* list = PyTuple_GET_ITEM(columns, c);
    for (int64_t row = 0; row < lengths_[c]; ++row) held_.push_back(PyList_GET_ITEM(list, row));
  }
}

void TensorLists::bind(Plan* plan, std::vector<int64_t> rows, std::vector<int> names) {
  for (const int64_t row : rows)
    if (row < 0 || row >= *std::max_element(lengths_.begin(), lengths_.end()))
      throw std::invalid_argument("TensorLists: no such row");
  if (names.size() != lengths_.size()) throw std::invalid_argument("TensorLists: one plan column per list is needed");
  bound_.push_back({plan, std::move(rows), std::move(names)});
}

void TensorLists::require_alive(PyObject* weak) { buffers_.push_back(Ref::to(weak)); }

// Whether no two tensors of a column, where they were found, reach into the same memory. Those that interleave without a
// shared element do, which is for the caller's checks to tell.
bool TensorLists::apart(size_t column) const {
  std::vector<std::pair<uintptr_t, uintptr_t>> reaches;
  for (size_t i = begins_[column]; i < begins_[column + 1]; ++i)
    if (known_[i].extent != 0) reaches.emplace_back(found_[i], found_[i] + known_[i].extent);
  std::sort(reaches.begin(), reaches.end());
  for (size_t i = 1; i < reaches.size(); ++i)
    if (reaches[i].first < reaches[i - 1].second) return false;
  return true;
}

// Asks for the memory of a tensor that is looked at soon. Torch keeps what it knows of one in memory of its own, which is in
// no cache after a whole pass of a model. tensor: null: not known yet.
void TensorLists::ask_for(size_t index, PyObject* tensor) const {
  if (tensor != nullptr) __builtin_prefetch(tensor);
  const char* shape = static_cast<const char*>(shapes_[index]);
  if (shape == nullptr) return;
  for (int64_t line = -1; line < 3; ++line) __builtin_prefetch(shape + 64 * line);
}

// Whether the tensor at this place is laid out as it was; notes where it lies and whether its column has moved.
bool TensorLists::follows(size_t index, size_t column, const TensorLayout& layout, unsigned& moved) {
  found_[index] = layout.address;
  shapes_[index] = layout.shape;
  if (layout.address != addresses_[index]) moved |= 1u << column;
  return same_layout(known_[index], layout);
}

// The end of a look that has found every tensor laid out as it was: whether the plans may follow, which they do then.
bool TensorLists::settle(unsigned moved) {
  moved_ = (moved & written_) != 0;
  for (size_t c = 0; c < lengths_.size(); ++c)
    if ((moved & written_ & 1u << c) != 0 && !apart(c)) return false;
  for (const Ref& buffer : buffers_) {
    const Ref alive(PyObject_CallNoArgs(buffer.get()));
    if (!alive) PyErr_Clear();
    if (!alive || alive.get() == Py_None) return false;
  }
  if (moved == 0) return true;
  addresses_.swap(found_);
  for (size_t c = 0; c < lengths_.size(); ++c) {
    if ((moved & 1u << c) == 0) continue;
    for (const Bound& bound : bound_) {
      std::vector<uintptr_t> addresses;
      for (const int64_t row : bound.rows) addresses.push_back(addresses_[begins_[c] + static_cast<size_t>(row)]);
      bound.plan->point(static_cast<Column>(bound.names[c]), addresses, false);
    }
  }
  return true;
}

bool TensorLists::refresh(PyObject* columns, bool recorded) {
  unsigned moved = 0;
  const auto follow = [&](size_t index, size_t column, const TensorLayout& layout) {
    return follows(index, column, layout, moved);
  };
  return readable_ && visit(columns, recorded, follow) && settle(moved);
}

PyObject* TensorLists::take_gradients(TensorLists& gradients, PyObject* weights) {
  if (lengths_.size() != 1 || gradients.lengths_ != lengths_)
    throw std::invalid_argument("TensorLists: two lists are needed");
  const int64_t length = PyList_GET_SIZE(weights);
  if (!readable_ || !gradients.readable_ || length != lengths_[0]) Py_RETURN_NONE;
  std::vector<Ref> all;  // not a list yet: reading lets other threads run, which could come across one with holes
  all.reserve(static_cast<size_t>(length));
  unsigned moved = 0, gradients_moved = 0;
  TensorLayout layout;
  constexpr int64_t kAhead = 8;
  for (int64_t row = 0; row < length; ++row) {
    if (row + kAhead < length) {
      ask_for(row + kAhead, PyList_GET_ITEM(weights, row + kAhead));
      gradients.ask_for(row + kAhead, nullptr);
    }
    PyObject* weight = PyList_GET_ITEM(weights, row);
    if (!look(row, weight, false, layout) || !follows(row, 0, layout, moved)) Py_RETURN_NONE;
    all.push_back(gradient().of(weight));
    if (!all.back()) return nullptr;
    if (!read(all.back().get(), false, layout) || !gradients.follows(row, 0, layout, gradients_moved)) Py_RETURN_NONE;
  }
  if (!settle(moved) || !gradients.settle(gradients_moved)) Py_RETURN_NONE;
  PyObject* list = PyList_New(length);
  for (int64_t row = 0; list != nullptr && row < length; ++row) PyList_SET_ITEM(list, row, all[row].release());
  return list;
}

namespace {

// An attribute of any object, in the quicker way where it is a plain tensor.
Ref attribute_of(PyObject* object, bool of_gradient) {
  static PyObject *const grad = name("grad"), *const required = name("requires_grad");
  if (is_plain(object)) return (of_gradient ? gradient() : requires_grad()).of(object);
  return Ref(PyObject_GetAttr(object, of_gradient ? grad : required));
}

}  // namespace

PyObject* gradients_of(PyObject* tensors) {
  Ref list(PyList_New(0));
  for (Py_ssize_t i = 0; list && i < PyList_GET_SIZE(tensors); ++i) {
    const Ref found = attribute_of(PyList_GET_ITEM(tensors, i), true);
    if (!found || (found.get() != Py_None && PyList_Append(list.get(), found.get()) != 0)) return nullptr;
  }
  return list.release();
}

Selection::Selection(PyObject* tensors, bool gradient) : gradient_(gradient) {
  for (Py_ssize_t i = 0; i < PyList_Size(tensors); ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors, i);
    tensors_.emplace_back(tensor, selects(tensor));
  }
}

bool Selection::selects(PyObject* tensor) const {
  const Ref found = attribute_of(tensor, gradient_);
  if (!found) PyErr_Clear();
  return found.get() != (gradient_ ? Py_None : Py_False);
}

// Whether these lists hold the same tensors and accept(tensor, whether it was selected) is true of all.
template <class Accept>
bool Selection::all(PyObject* lists, Accept&& accept) const {
  size_t index = 0;
  for (Py_ssize_t l = 0; l < PyList_Size(lists); ++l) {
    PyObject* list = PyList_GET_ITEM(lists, l);
    if (!PyList_Check(list)) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i, ++index) {
      PyObject* tensor = PyList_GET_ITEM(list, i);
      if (index == tensors_.size() || tensors_[index].first != tensor || !accept(tensor, tensors_[index].second))
        return false;
    }
  }
  return index == tensors_.size();
}

bool Selection::same_tensors(PyObject* lists) const {
  return all(lists, [](PyObject*, bool) { return true; });
}

bool Selection::same(PyObject* lists) const {
  return all(lists, [&](PyObject* tensor, bool selected) { return selected || !selects(tensor); });
}

// -- the plans of an operation --------------------------------------------------------------------------------------------

bool ListPlans::take_last(Kept& kept) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.empty()) return false;
  kept = std::move(idle_.back());
  idle_.pop_back();
  return true;
}

void ListPlans::put_back(Kept kept) {
  Kept oldest;  // ends after the lock
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(kept));
  if (idle_.size() <= capacity_) return;
  oldest = std::move(idle_.front());
  idle_.pop_front();
}

void ListPlans::keep(TensorLists* lists, PyObject* owner, PyObject* serve, PyObject* buckets, PyObject* backend) {
  put_back({lists, Ref::to(owner), Ref::to(serve), Ref::to(buckets), Ref::to(backend)});
}

PyObject* ListPlans::call(PyObject* columns, PyObject* arguments, PyObject* backend) {
  Kept kept;
  std::vector<Kept> others;
  bool found = false;
  if (!observed()) {
    const bool recorded = recording();
    while (!found && take_last(kept)) {
      found = kept.backend.get() == backend && kept.lists->refresh(columns, recorded);
      if (!found) others.push_back(std::move(kept));
    }
    for (auto other = others.rbegin(); other != others.rend(); ++other) put_back(std::move(*other));
  }
  if (!found) Py_RETURN_NOTIMPLEMENTED;
  Ref result;
  if (kept.buckets.get() == Py_None) {
    result = Ref(PyObject_CallFunctionObjArgs(kept.serve.get(), columns, arguments, nullptr));
  } else {
    std::array<PyObject*, kMostArguments + 1> all{kept.buckets.get()};
    const Py_ssize_t count = PyTuple_GET_SIZE(arguments);
    if (count > kMostArguments) throw std::length_error("ListPlans: too many arguments");
    for (Py_ssize_t i = 0; i < count; ++i) all[i + 1] = PyTuple_GET_ITEM(arguments, i);
    result = Ref(PyObject_Vectorcall(kept.serve.get(), all.data(), count + 1, nullptr));
  }
  if (!result) return nullptr;  // who knows how far it came: its plan ends here
  put_back(std::move(kept));
  return increment_versions(columns) ? result.release() : nullptr;
}

// Of everything that is written, in one call.
bool ListPlans::increment_versions(PyObject* columns) const {
  Ref written;
  for (Py_ssize_t c = 0; c < PyTuple_GET_SIZE(columns); ++c) {
    PyObject* column = PyTuple_GET_ITEM(columns, c);
    if ((written_ & 1u << c) == 0 || column == Py_None) continue;
    written = written ? Ref(PySequence_Concat(written.get(), column)) : Ref::to(column);
    if (!written) return false;
  }
  return !written || Ref(PyObject_CallOneArg(torch.increment_version, written.get()));
}

}  // namespace fastpost
