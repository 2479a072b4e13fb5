// The tensors of a Python caller, seen without torch's headers: where they lie, their dtype, shape and strides. Knows
// Python's C interface; nothing else but the bindings does.
#pragma once

#include <Python.h>

#include <cstdint>
#include <deque>
#include <mutex>
#include <utility>
#include <vector>

#include "api.h"
#include "core/plan.h"

namespace fastpost {

// A reference to a Python object, given back when this ends. Null where a call of Python has failed.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  static Ref to(PyObject* borrowed) {
    Py_INCREF(borrowed);
    return Ref(borrowed);
  }
  Ref(Ref&& other) noexcept : object_(other.release()) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

// What a kernel depends on of one tensor. dtype and device are only ever compared.
struct TensorLayout {
  uintptr_t address;
  int64_t dtype, device, itemsize;
  int64_t dimensions;
  const int64_t *shape, *strides;  // valid until the next tensor is read
};

// What Python has to say about torch, once per process, before anything below is used. The references are borrowed for good.
struct Torch {
  PyObject* exchange;            // what the tensor class offers as __dlpack_c_exchange_api__; None: slower ways are taken
  std::vector<PyObject*> plain;  // the classes whose instances are nothing but memory; their subclasses are not
  std::vector<PyObject*> observers;  // functions without arguments; where one returns true, torch has to see each call
  PyObject* grad_enabled;            // a function without arguments: whether autograd records
  PyObject* set_grad_enabled;        // a function of a bool: it records from now on, or does not
  PyObject* function_modes;          // a function without arguments: how many modes see what Python calls of torch
  PyObject* past_modes;              // a function that makes a context manager, under which they do not
  PyObject* increment_version;       // a function of a list of tensors, whose version counters it raises
  PyObject* float64_tensor;          // a function that makes a tensor on the CPU of a tuple of floats, or of one float
  PyObject* is_neg;                  // a function of a tensor: whether its values are those in memory with the sign turned
  PyObject* num_threads;             // a function without arguments: how many threads an operation may use
  std::vector<PyObject*> dtypes;     // those of DType, in its order
};
void attach(Torch torch);

// Whether torch has to see a call with these arguments (a tuple, in which lists may hold tensors): a mode or a
// transformation is on, autograd would record it, or a tensor is no plain one.
bool needs_dispatcher(PyObject* arguments);

// function(*arguments, **keywords), while autograd does not record; then it does as it did. No mode of torch sees it turned
// off and on. A new reference, or null with an error.
PyObject* without_grad(PyObject* function, PyObject* arguments, PyObject* keywords);

// The value of a number, or of a tensor of one element; false with a Python error.
bool number(PyObject* object, double& value);

// The value of a tensor of one int64; false with a Python error.
bool whole_number(PyObject* tensor, uint64_t& value);

// The dtype that torch's object stands for; false with a Python error where kernels do not know it.
bool dtype_named(PyObject* object, DType& dtype);

// How many threads torch's operations may use; 0 with a Python error.
int num_threads();

// A float64 tensor on the CPU that holds these values; a scalar where there is one. A new reference, or null with an error.
PyObject* float64_tensor(const double* values, int count);

// A float32 scalar on the CPU, as above; only where `read_rows` has read something.
PyObject* float32_scalar(double value);

// Two streams of logits and what belongs to their rows, as they lie in memory. Null: not given.
struct RowTensors {
  DType dtype;
  int64_t rows, cols;
  int64_t batch;  // the length of the first dimension; 1 where there are classes alone
  LogitRows clean, noised, grad_clean, grad_noised;
  const int64_t* labels;
  const bool* mask;

  // Whether gradients take the place of logits.
  bool in_place() const {
    return (grad_clean.address != nullptr && grad_clean.address == clean.address) ||
           (grad_noised.address != nullptr && grad_noised.address == noised.address);
  }
};

// Reads them from tensors, or from None where they may be left out: logits (..., classes) of one shape and dtype, rows at
// one distance; gradients like them, or the logits themselves where both streams lie apart; labels (int64) and mask (bool),
// contiguous (...); all on one device. False where anything differs from that or torch has to see the call; that a tensor
// requires a gradient is no reason.
bool read_rows(PyObject* clean, PyObject* noised, PyObject* labels, PyObject* mask, PyObject* grad_clean,
               PyObject* grad_noised, RowTensors& tensors);

// The same without labels and gradients, for the CPU. False as well where autograd would record the call.
bool read_unrecorded_rows(PyObject* clean, PyObject* noised, PyObject* mask, RowTensors& tensors);

// Reads one or two gradients of rows, which lie as above, and the float32 scalar on their device that they are to be
// multiplied by. second: None: one.
bool read_gradients(PyObject* first, PyObject* second, PyObject* factor, RowTensors& tensors, const float*& by);

// Lists of tensors as they were when last looked at, and the plans that point at them. Holds no tensor. One thread at a
// time.
class TensorLists {
 public:
  // columns: a tuple of lists of one length, or None for those left out.
  // written: the columns (bit c) in which no two tensors may share memory.
  // held: whether the caller holds these very tensors for as long as this is used, so that a tensor at the address of one of
  // them is that one.
  TensorLists(PyObject* columns, unsigned written, bool held);

  // `plan`, whose tensor t is rows[t] of the lists, has its columns where names[c] says, and is repointed when they move.
  void bind(Plan* plan, std::vector<int64_t> rows, std::vector<int> names);

  // `weak` is a weak reference to a buffer whose padding the plans may write.
  void require_alive(PyObject* weak);

  // Whether the plans bound here can serve these lists; where tensors have moved, the plans follow. This is the one rule
  // by which a plan is used again:
  // - every tensor is a plain one, has the dtype, device, shape and strides that it had, and requires no gradient that
  //   autograd would record (`recorded`: it records);
  // - where a written column has moved, no two of its tensors reach into the same memory;
  // - the buffers whose padding may be written are alive.
  // Otherwise the plan stays for lists that it fits, and the caller checks everything and makes another.
  bool refresh(PyObject* columns, bool recorded);

  // The gradients of these weights, a new list in their order, where both may be used as in `refresh`: this knows the
  // weights, `gradients` their gradients. None where they may not; null with an error.
  PyObject* take_gradients(TensorLists& gradients, PyObject* weights);

  // Whether the last look found a written column elsewhere than the one before.
  bool moved() const { return moved_; }

  TensorLists(const TensorLists&) = delete;
  TensorLists& operator=(const TensorLists&) = delete;

 private:
  struct Known {
    int64_t dtype, device, dimensions;
    size_t sizes;      // where its shape begins in sizes_, followed by its strides
    uintptr_t extent;  // bytes from its first element to the end of its last; 0: it has no elements
  };
  struct Bound {
    Plan* plan;
    std::vector<int64_t> rows;
    std::vector<int> names;
  };

  template <class Visit>
  bool visit(PyObject* columns, bool recorded, Visit&& each) const;
  bool look(size_t index, PyObject* tensor, bool recorded, TensorLayout& layout) const;
  bool same_layout(const Known& known, const TensorLayout& layout) const;
  void ask_for(size_t index, PyObject* tensor) const;
  bool follows(size_t index, size_t column, const TensorLayout& layout, unsigned& moved);
  bool settle(unsigned moved);
  bool apart(size_t column) const;

  unsigned written_;
  bool moved_ = false;
  bool readable_ = false;                     // whether all tensors could be read; where not, nothing is ever the same
  std::vector<int64_t> lengths_;              // of each column; -1: left out
  std::vector<size_t> begins_;                // of each column in the lists that follow, and the end of the last
  std::vector<Known> known_;                  // by column and row
  std::vector<uintptr_t> addresses_, found_;  // found_: room for those of a look that may fail halfway
  std::vector<int64_t> sizes_;
  std::vector<const void*> shapes_;  // where the shapes lay that were read last; only ever asked for
  std::vector<PyObject*> held_;      // by column and row; none where they are not held
  std::vector<Bound> bound_;
  std::vector<Ref> buffers_;
};

// The gradients that there are of these tensors, a new list in their order; null with an error.
PyObject* gradients_of(PyObject* tensors);

// Which of a list of tensors have a gradient, or require one. Holds none of them: whoever relies on this holds those that
// were selected.
class Selection {
 public:
  Selection(PyObject* tensors, bool gradient);

  // Whether these lists (a list of lists), one after another, hold the same tensors.
  bool same_tensors(PyObject* lists) const;

  // The same, and none that was not selected then would be now. (Those that were, and would not be, are for the caller to
  // look at, if that matters.)
  bool same(PyObject* lists) const;

 private:
  template <class Accept>
  bool all(PyObject* lists, Accept&& accept) const;
  bool selects(PyObject* tensor) const;

  bool gradient_;
  std::vector<std::pair<PyObject*, bool>> tensors_;
};

// The plans of one operation that are not in use. Calls from several threads, and calls within calls, never share one.
class ListPlans {
 public:
  // written: the columns (bit c) that the operation writes.
  // capacity: how many plans are kept; the one that has not been used for longest goes first.
  ListPlans(unsigned written, size_t capacity) : written_(written), capacity_(capacity) {}
  ListPlans(const ListPlans&) = delete;
  ListPlans& operator=(const ListPlans&) = delete;

  // Serves a call by a plan that fits and tells autograd what was written. A new reference: the result; NotImplemented where
  // there is no such plan or torch has to see the call; null with an error.
  PyObject* call(PyObject* columns, PyObject* arguments, PyObject* backend);

  // A plan: what the lists looked like, and the function to call with the buckets (or the one bucket's native plan) and a
  // call's arguments. Where `buckets` is None it takes the lists and the tuple of arguments. backend: compared by identity
  // with that of a call.
  void keep(TensorLists* lists, PyObject* owner, PyObject* serve, PyObject* buckets, PyObject* backend);

 private:
  struct Kept {
    TensorLists* lists;
    Ref owner, serve, buckets, backend;  // owner: of lists
  };
  bool take_last(Kept& kept);
  void put_back(Kept kept);
  bool increment_versions(PyObject* columns) const;

  unsigned written_;
  size_t capacity_;
  std::mutex mutex_;       // never held while Python runs
  std::deque<Kept> idle_;  // the one used last is the last
};

}  // namespace fastpost
