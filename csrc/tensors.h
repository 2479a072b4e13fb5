// The tensors of a Python caller, seen without torch's headers: where they lie, their dtype, shape and strides. Knows
// Python's C interface; nothing else but bindings.cpp does.
#pragma once

#include <Python.h>

#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "core/plan.h"

namespace fastpost {

// What a kernel depends on of one tensor. dtype and device are only ever compared.
struct TensorLayout {
  uintptr_t address;
  int64_t dtype, device;
  int64_t dimensions;
  const int64_t *shape, *strides;  // valid until the next tensor is read
};

// What Python has to say about torch, once per process, before anything below is used. The references are borrowed for good.
struct Torch {
  PyObject* exchange;              // what the tensor class offers as __dlpack_c_exchange_api__; None: slower ways are taken
  std::vector<PyObject*> plain;    // the classes whose instances are nothing but memory; their subclasses are not
  std::vector<PyObject*> watches;  // functions without arguments; where one returns true, torch has to see each call
  PyObject* records;               // a function without arguments: whether autograd records
  PyObject* wrote;                 // a function of a list of tensors, whose version counters it raises
  PyObject* doubles;               // a function that makes a float64 tensor on the CPU of a tuple of floats, or of one float
  PyObject* negated;               // a function of a tensor: whether its values are those in memory with the sign turned
};
void attach(Torch torch);

// The value of a number, or of a tensor of one element; false with a Python error.
bool number(PyObject* object, double& value);

// A float64 tensor on the CPU that holds these values; a scalar where there is one. A new reference, or null with an error.
PyObject* doubles(const double* values, int count);

// Lists of tensors as they were when last looked at, and the plans that point at them. Holds no tensor. One thread at a
// time.
class TensorLists {
 public:
  // columns: a tuple of lists of one length, or None for those left out.
  // fixed: the columns (bit c) that may not move: what is checked of them depends on their addresses.
  TensorLists(PyObject* columns, unsigned fixed);

  // Whether all tensors could be read; where not, nothing is ever the same.
  bool readable() const { return readable_; }

  // `plan`, whose tensor t is rows[t] of the lists, has its columns where names[c] says, and is repointed when they move.
  void bind(Plan* plan, std::vector<int64_t> rows, std::vector<int> names);

  // `weak` is a weak reference; the lists are not the same once it is dead.
  void require_alive(PyObject* weak);

  // Whether these lists can be worked on by the plans bound here: dtypes, devices, shapes and strides are what they were,
  // and so are the addresses of fixed columns. Where others have moved, the plans follow.
  // recorded: no tensor may require a gradient.
  bool refresh(PyObject* columns, bool recorded);

  // Whether nothing has changed, addresses included. Changes nothing.
  bool same(PyObject* columns) const;

  ~TensorLists();
  TensorLists(const TensorLists&) = delete;
  TensorLists& operator=(const TensorLists&) = delete;

 private:
  struct Known {
    int64_t dtype, device, dimensions;
    size_t sizes;  // where its shape begins in sizes_, followed by its strides
  };
  struct Bound {
    Plan* plan;
    std::vector<int64_t> rows;
    std::vector<int> names;
  };

  template <class Visit>
  bool visit(PyObject* columns, bool recorded, Visit&& each) const;
  bool alike(const Known& known, const TensorLayout& layout) const;

  unsigned fixed_;
  bool readable_ = false;
  std::vector<int64_t> lengths_;  // of each column; -1: left out
  std::vector<Known> known_;      // by column and row
  std::vector<int64_t> sizes_;
  std::vector<uintptr_t> addresses_, found_;  // found_: room for those of a look that may fail halfway
  std::vector<Bound> bound_;
  std::vector<PyObject*> weak_;
};

// The plans of one operation that are not in use. Calls from several threads, and calls within calls, never share one.
class ListPlans {
 public:
  // written: the columns (bit c) that the operation writes.
  // capacity: how many plans are kept; the one that has not been used for longest goes first.
  ListPlans(unsigned written, size_t capacity) : written_(written), capacity_(capacity) {}
  ~ListPlans();
  ListPlans(const ListPlans&) = delete;
  ListPlans& operator=(const ListPlans&) = delete;

  // Whether torch has to see a call with these lists: a mode is on, autograd would record it, or a tensor is no plain one.
  static bool torch_sees(PyObject* columns);

  // Serves a call by a plan that fits and tells autograd what was written. A new reference: the result; NotImplemented where
  // there is no such plan or torch has to see the call; null with an error.
  PyObject* call(PyObject* columns, PyObject* arguments, PyObject* backend);

  // A plan: what the lists looked like, and the function to call with `first` (the buckets) and a call's arguments. Where
  // `first` is None it takes the lists and the tuple of arguments. backend: compared by identity with that of a call.
  void keep(TensorLists* lists, PyObject* seen, PyObject* serve, PyObject* first, PyObject* backend);

 private:
  struct Kept {
    TensorLists* lists;
    PyObject *seen, *serve, *first, *backend;  // seen: the owner of lists
  };
  bool take_last(Kept& kept);
  void put_back(const Kept& kept);
  static void release(const Kept& kept);
  bool tell(PyObject* columns) const;

  unsigned written_;
  size_t capacity_;
  std::mutex mutex_;       // never held while Python runs
  std::deque<Kept> idle_;  // the one used last is the last
};

}  // namespace fastpost
