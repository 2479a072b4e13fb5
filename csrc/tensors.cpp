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
constexpr DLDataType kDouble{2, 64, 1};
constexpr int kMostDoubles = 6;  // the sums of a perturbation
constexpr Py_ssize_t kMostArguments = 15;

// An attribute, or what a method without arguments returns, as an integer; false with a cleared error where there is none.
bool as_integer(PyObject* owned, int64_t& value) {
  if (owned != nullptr) value = PyLong_AsLongLong(owned);
  Py_XDECREF(owned);
  if (PyErr_Occurred() == nullptr) return owned != nullptr;
  PyErr_Clear();
  return false;
}

bool is_true(PyObject* function) {
  PyObject* result = PyObject_CallNoArgs(function);
  const int truth = result == nullptr ? -1 : PyObject_IsTrue(result);
  Py_XDECREF(result);
  if (truth < 0) PyErr_Clear();
  return truth != 0;
}

bool is_true(PyObject* object, PyObject* name) {
  PyObject* result = PyObject_GetAttr(object, name);
  const bool truth = result != Py_False;
  Py_XDECREF(result);
  if (result == nullptr) PyErr_Clear();
  return truth;
}

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// Appends a tuple of integers.
bool append(PyObject* owned, std::vector<int64_t>& sizes) {
  const bool usable = owned != nullptr && PyTuple_Check(owned);
  for (Py_ssize_t d = 0; usable && d < PyTuple_GET_SIZE(owned); ++d)
    sizes.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(owned, d)));
  Py_XDECREF(owned);
  if (PyErr_Occurred() == nullptr) return usable;
  PyErr_Clear();
  return false;
}

constexpr int64_t key(DLDataType dtype) { return int64_t{dtype.code} << 32 | int64_t{dtype.bits} << 16 | dtype.lanes; }

constexpr int64_t key(DLDevice device) { return int64_t{device.type} << 32 | static_cast<uint32_t>(device.id); }

// -- one tensor -----------------------------------------------------------------------------------------------------------

bool watched() {
  return std::any_of(torch.watches.begin(), torch.watches.end(), [](PyObject* watch) { return is_true(watch); });
}

bool read_attributes(PyObject* tensor, TensorLayout& layout) {
  static PyObject *const data_ptr = name("data_ptr"), *const dtype = name("dtype"), *const device = name("device"),
                         *const shape = name("shape"), *const stride = name("stride");
  int64_t address = 0;
  if (!as_integer(PyObject_CallMethodNoArgs(tensor, data_ptr), address)) return false;
  layout.address = static_cast<uintptr_t>(address);
  PyObject* kind = PyObject_GetAttr(tensor, dtype);  // there is one object per dtype
  layout.dtype = reinterpret_cast<int64_t>(kind);
  Py_XDECREF(kind);
  PyObject* place = PyObject_GetAttr(tensor, device);  // whose hash is made of its type and index
  layout.device = place == nullptr ? -1 : PyObject_Hash(place);
  Py_XDECREF(place);
  thread_local std::vector<int64_t> sizes;
  sizes.clear();
  if (!append(PyObject_GetAttr(tensor, shape), sizes)) return false;
  layout.dimensions = static_cast<int64_t>(sizes.size());
  if (!append(PyObject_CallMethodNoArgs(tensor, stride), sizes)) return false;
  layout.shape = sizes.data();
  layout.strides = sizes.data() + layout.dimensions;
  return static_cast<int64_t>(sizes.size()) == 2 * layout.dimensions;
}

// False where the tensor is no plain one, is to be read with its sign turned, has elements but no memory of its own
// (wrappers of torch's transformations), or, if `recorded`, requires a gradient.
bool read(PyObject* tensor, bool recorded, TensorLayout& layout) {
  static PyObject* const requires_grad = name("requires_grad");
  const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (std::find(torch.plain.begin(), torch.plain.end(), type) == torch.plain.end()) return false;
  if (recorded && is_true(tensor, requires_grad)) return false;
  PyObject* negated = PyObject_CallOneArg(torch.negated, tensor);
  Py_XDECREF(negated);
  if (negated == nullptr) PyErr_Clear();
  if (negated != Py_False) return false;
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
    layout.dimensions = seen.ndim;
    layout.shape = seen.shape;
    layout.strides = seen.strides;
  }
  const int64_t* end = layout.shape + layout.dimensions;
  return layout.address != 0 || std::find(layout.shape, end, 0) != end;
}

}  // namespace

void attach(Torch given) {
  torch = std::move(given);
  table = nullptr;
  if (!PyCapsule_IsValid(torch.exchange, kCapsule)) return;
  table = static_cast<const DLPackTable*>(PyCapsule_GetPointer(torch.exchange, kCapsule));
  while (table != nullptr && table->major != kMajor) table = table->previous;
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

PyObject* doubles(const double* values, int count) {
  if (table == nullptr) {
    PyObject* given = count == 1 ? PyFloat_FromDouble(*values) : PyTuple_New(count);
    for (int i = 0; given != nullptr && count != 1 && i < count; ++i)
      PyTuple_SET_ITEM(given, i, PyFloat_FromDouble(values[i]));
    PyObject* made = given == nullptr ? nullptr : PyObject_CallOneArg(torch.doubles, given);
    Py_XDECREF(given);
    return made;
  }
  struct Owned {
    DLManagedTensor managed;
    int64_t shape, stride;
    double values[kMostDoubles];
  };
  Owned* owned = new Owned{};
  owned->shape = count;
  owned->stride = 1;
  std::copy(values, values + count, owned->values);
  const auto destroy = [](DLManagedTensor* managed) { delete reinterpret_cast<Owned*>(managed); };
  const DLTensor tensor{owned->values, kCpu, count == 1 ? 0 : 1, kDouble, &owned->shape, &owned->stride, 0};
  owned->managed = {kMajor, 0, nullptr, destroy, 0, tensor};
  void* made = nullptr;
  if (table->to_python(&owned->managed, &made) != 0) return nullptr;
  return static_cast<PyObject*>(made);
}

// -- lists ----------------------------------------------------------------------------------------------------------------

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
      if (!read(PyList_GET_ITEM(list, row), recorded, layout) || !each(index++, c, layout)) return false;
  }
  return true;
}

bool TensorLists::alike(const Known& known, const TensorLayout& layout) const {
  const size_t bytes = static_cast<size_t>(layout.dimensions) * sizeof(int64_t);
  return known.dtype == layout.dtype && known.device == layout.device && known.dimensions == layout.dimensions &&
         std::memcmp(&sizes_[known.sizes], layout.shape, bytes) == 0 &&
         std::memcmp(&sizes_[known.sizes] + known.dimensions, layout.strides, bytes) == 0;
}

TensorLists::TensorLists(PyObject* columns, unsigned fixed) : fixed_(fixed) {
  for (Py_ssize_t c = 0; c < PyTuple_Size(columns); ++c) {
    PyObject* list = PyTuple_GET_ITEM(columns, c);
    lengths_.push_back(list == Py_None ? -1 : PyList_GET_SIZE(list));
  }
  readable_ = visit(columns, false, [&](size_t, size_t, const TensorLayout& layout) {
    known_.push_back({layout.dtype, layout.device, layout.dimensions, sizes_.size()});
    sizes_.insert(sizes_.end(), layout.shape, layout.shape + layout.dimensions);
    sizes_.insert(sizes_.end(), layout.strides, layout.strides + layout.dimensions);
    addresses_.push_back(layout.address);
    return true;
  });
  sizes_.push_back(0);  // so that there is a place to begin for scalars as well
  found_ = addresses_;
}

TensorLists::~TensorLists() {
  for (PyObject* weak : weak_) Py_DECREF(weak);
}

void TensorLists::bind(Plan* plan, std::vector<int64_t> rows, std::vector<int> names) {
  for (const int64_t row : rows)
    if (row < 0 || row >= *std::max_element(lengths_.begin(), lengths_.end()))
      throw std::invalid_argument("TensorLists: no such row");
  if (names.size() != lengths_.size()) throw std::invalid_argument("TensorLists: one plan column per list is needed");
  bound_.push_back({plan, std::move(rows), std::move(names)});
}

void TensorLists::require_alive(PyObject* weak) {
  Py_INCREF(weak);
  weak_.push_back(weak);
}

bool TensorLists::refresh(PyObject* columns, bool recorded) {
  unsigned moved = 0;
  const bool usable = readable_ && visit(columns, recorded, [&](size_t index, size_t c, const TensorLayout& layout) {
                        found_[index] = layout.address;
                        if (layout.address != addresses_[index]) moved |= 1u << c;
                        return alike(known_[index], layout) && (moved & fixed_) == 0;
                      });
  if (!usable) return false;
  for (PyObject* weak : weak_) {
    PyObject* object = PyObject_CallNoArgs(weak);
    Py_XDECREF(object);
    if (object == nullptr) PyErr_Clear();
    if (object == nullptr || object == Py_None) return false;
  }
  if (moved == 0) return true;
  addresses_.swap(found_);
  size_t first = 0;
  for (size_t c = 0; c < lengths_.size(); ++c) {
    if (moved & (1u << c))
      for (const Bound& bound : bound_) {
        std::vector<uintptr_t> addresses;
        for (const int64_t row : bound.rows) addresses.push_back(addresses_[first + row]);
        bound.plan->point(static_cast<Column>(bound.names[c]), addresses, false);
      }
    first += std::max<int64_t>(lengths_[c], 0);
  }
  return true;
}

bool TensorLists::same(PyObject* columns) const {
  return readable_ && visit(columns, false, [&](size_t index, size_t, const TensorLayout& layout) {
           return layout.address == addresses_[index] && alike(known_[index], layout);
         });
}

// -- the plans of an operation --------------------------------------------------------------------------------------------

ListPlans::~ListPlans() {
  for (const Kept& kept : idle_) release(kept);
}

void ListPlans::release(const Kept& kept) {
  for (PyObject* object : {kept.seen, kept.serve, kept.first, kept.backend}) Py_DECREF(object);
}

bool ListPlans::take_last(Kept& kept) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.empty()) return false;
  kept = idle_.back();
  idle_.pop_back();
  return true;
}

void ListPlans::put_back(const Kept& kept) {
  Kept oldest;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(kept);
    if (idle_.size() <= capacity_) return;
    oldest = idle_.front();
    idle_.pop_front();
  }
  release(oldest);
}

void ListPlans::keep(TensorLists* lists, PyObject* seen, PyObject* serve, PyObject* first, PyObject* backend) {
  for (PyObject* object : {seen, serve, first, backend}) Py_INCREF(object);
  put_back({lists, seen, serve, first, backend});
}

bool ListPlans::torch_sees(PyObject* columns) {
  const bool recorded = is_true(torch.records);
  if (watched()) return true;
  TensorLayout layout;
  for (Py_ssize_t c = 0; c < PyTuple_Size(columns); ++c) {
    PyObject* list = PyTuple_GET_ITEM(columns, c);
    for (Py_ssize_t row = 0; list != Py_None && row < PyList_Size(list); ++row)
      if (!read(PyList_GET_ITEM(list, row), recorded, layout)) return true;
  }
  return false;
}

PyObject* ListPlans::call(PyObject* columns, PyObject* arguments, PyObject* backend) {
  Kept kept;
  std::vector<Kept> others;
  bool found = false;
  if (!watched()) {
    const bool recorded = is_true(torch.records);
    while (!found && take_last(kept)) {
      found = kept.backend == backend && kept.lists->refresh(columns, recorded);
      if (!found) others.push_back(kept);
    }
    for (auto other = others.rbegin(); other != others.rend(); ++other) put_back(*other);
  }
  if (!found) Py_RETURN_NOTIMPLEMENTED;
  PyObject* result = nullptr;
  if (kept.first == Py_None) {
    result = PyObject_CallFunctionObjArgs(kept.serve, columns, arguments, nullptr);
  } else {
    std::array<PyObject*, kMostArguments + 1> all{kept.first};
    const Py_ssize_t count = PyTuple_GET_SIZE(arguments);
    if (count > kMostArguments) throw std::length_error("ListPlans: too many arguments");
    for (Py_ssize_t i = 0; i < count; ++i) all[i + 1] = PyTuple_GET_ITEM(arguments, i);
    result = PyObject_Vectorcall(kept.serve, all.data(), count + 1, nullptr);
  }
  if (result == nullptr) {  // who knows how far it came
    release(kept);
    return nullptr;
  }
  put_back(kept);
  if (tell(columns)) return result;
  Py_DECREF(result);
  return nullptr;
}

// Raises the version counters of what is written, in one call.
bool ListPlans::tell(PyObject* columns) const {
  PyObject *written = nullptr, *joined = nullptr;
  for (Py_ssize_t c = 0; c < PyTuple_GET_SIZE(columns); ++c) {
    PyObject* column = PyTuple_GET_ITEM(columns, c);
    if ((written_ & 1u << c) == 0 || column == Py_None) continue;
    if (written == nullptr) {
      written = column;
      continue;
    }
    PyObject* longer = PySequence_Concat(joined == nullptr ? written : joined, column);
    Py_XDECREF(joined);
    if (longer == nullptr) return false;
    joined = longer;
  }
  if (written == nullptr) return true;
  PyObject* none = PyObject_CallOneArg(torch.wrote, joined == nullptr ? written : joined);
  Py_XDECREF(joined);
  Py_XDECREF(none);
  return none != nullptr;
}

}  // namespace fastpost
