// What Python calls: lists of tensors, noise and the losses of whole calls here, rows of logits in row_bindings.cpp. Mirrors
// api.h; the GIL is released while a kernel runs.
#include "bindings.h"

#include <pybind11/stl.h>

#include <optional>

#include "tensors.h"

namespace fastpost {
namespace {

constexpr int64_t kWorthReleasing = int64_t{1} << 13;  // elements; less is done before another thread has woken up

// work() on a plan, without the GIL.
template <class Work>
auto released(const Plan& plan, Work&& work) {
  std::optional<py::gil_scoped_release> release;
  if (plan.elements() >= kWorthReleasing) release.emplace();
  return work();
}

// The same, and what it returns as a tensor.
template <class Work>
py::object as_tensor(const Plan& plan, Work&& work) {
  const auto result = released(plan, work);
  PyObject* tensor = nullptr;
  if constexpr (std::is_same_v<std::decay_t<decltype(result)>, PerturbSums>) {
    const double sums[] = {result.intended_sq, result.stored_sq, result.stored_dot,
                           result.seen_sq,     result.seen_dot,  result.changed};
    tensor = float64_tensor(sums, 6);
  } else {
    tensor = float64_tensor(&result, 1);
  }
  if (tensor == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(tensor);
}

// A number, or a tensor of one.
double value_of(py::handle object) {
  double value = 0;
  if (!number(object.ptr(), value)) throw py::error_already_set();
  return value;
}

// Asks torch only where more than one would be used.
int threads_of(const Plan& plan) {
  if (plan.elements() < kWorthThreads) return 1;
  const int threads = num_threads();
  if (threads < 1) throw py::error_already_set();
  return threads;
}

DType dtype_of(const Plan& plan, py::handle dtype) {
  DType found = plan.dtype();
  if (!dtype.is_none() && !dtype_named(dtype.ptr(), found)) throw py::error_already_set();
  return found;
}

// What a call of Python says of a perturbation: a number or a tensor of one, torch's dtype or None for the plan's own, a
// tensor of one int64 or None to round to nearest.
struct PerturbCall {
  PerturbCall(const Plan& plan, py::handle squared_norm, double rho, bool adaptive, double eta, py::handle compute_dtype,
              py::handle seed)
      : how{rho, adaptive, eta, dtype_of(plan, compute_dtype)}, squared(value_of(squared_norm)), random(!seed.is_none()) {
    if (random && !whole_number(seed.ptr(), key)) throw py::error_already_set();
    threads = threads_of(plan);
  }
  const uint64_t* seed() const { return random ? &key : nullptr; }

  Perturbation how;
  double squared;
  bool random;
  uint64_t key = 0;
  int threads;
};

py::object squared_norm(const Plan& plan, bool adaptive, double eta) {
  const int threads = threads_of(plan);
  return as_tensor(plan, [&] { return cpu::squared_norm(plan, adaptive, eta, threads); });
}

py::object sam_perturb(Plan& plan, py::handle squared_norm, double rho, bool adaptive, double eta, py::handle compute_dtype,
                       py::handle seed) {
  const PerturbCall call(plan, squared_norm, rho, adaptive, eta, compute_dtype, seed);
  return as_tensor(plan, [&] {
    const PerturbSums sums = cpu::sam_perturb(plan, call.how, call.squared, call.seed(), call.threads);
    plan.stashed = true;
    return sums;
  });
}

void sam_restore(const Plan& plan) {
  const int threads = threads_of(plan);
  released(plan, [&] { cpu::sam_restore(plan, threads); });
}

// Operations on a list of one bucket as torch.ops.fastpost has them: a plan, and the arguments behind the schema's lists. An
// eager call comes here with nothing of Python in between.
void bind_cpu_lists(py::module_ lists) {
  lists.def("squared_norm", [](const Plan& plan, double eta) { return squared_norm(plan, plan.has(kWeight), eta); });
  lists.def("sam_perturb_", &sam_perturb);
  lists.def("sam_restore_", &sam_restore);
}

// A divergence of two streams of plain tensors on the CPU, reduced as symmetric_kl and js_divergence reduce it: a float32
// scalar. None where autograd would record the call or the core cannot say, and then nothing was done.
py::object kl_loss(bool jensen_shannon, py::handle clean, py::handle noised, py::handle mask, py::handle reduction) {
  const auto is = [&](const char* name) { return PyUnicode_CompareWithASCIIString(reduction.ptr(), name) == 0; };
  const bool known = PyUnicode_Check(reduction.ptr());
  const bool batchmean = known && is("batchmean"), mean = known && !batchmean && is("mean");
  if (!(batchmean || mean || (known && is("sum")))) return py::none();
  RowTensors t;
  if (!read_unrecorded_rows(clean.ptr(), noised.ptr(), mask.ptr(), t)) return py::none();
  const RowReduction how{batchmean ? 1.0 / static_cast<double>(t.batch) : 1.0, 1, mean, false, 1};
  const bool small = t.rows * t.cols < kWorthReleasing;
  const int threads = small ? 1 : num_threads();
  if (threads < 1) throw py::error_already_set();
  std::optional<py::gil_scoped_release> release;
  if (!small) release.emplace();
  const RowLosses losses = cpu::row_losses(jensen_shannon, t.clean, t.noised, t.grad_clean, t.grad_noised, t.dtype, t.rows,
                                           t.cols, nullptr, 0, t.mask, how, threads);
  release.reset();
  if (!losses.served || !losses.divergences.empty()) return py::none();
  PyObject* loss = float32_scalar(losses.loss);
  if (loss == nullptr) throw py::error_already_set();
  return py::make_tuple(py::reinterpret_steal<py::object>(loss));
}

// A plan of sam_decode_adamw and the rest of its arguments: lr, beta1, beta2, eps, weight_decay, maximize, steps, the two
// flags, and the list. Several come in one call, after which none of their weights is w + e, whatever interrupts Python.
template <class Step, class Scale, class Skip>
using DecodedStep =
    std::tuple<Plan*, double, double, double, double, double, bool, std::vector<Step>, Scale, Skip, Pointer, int64_t>;

// run(plan, how, steps, grad_scale, skip, list) for each.
template <class Step, class Scale, class Skip, class Run>
void for_decoded_steps(const std::vector<DecodedStep<Step, Scale, Skip>>& parts, Run&& run) {
  for (const auto& [plan, lr, beta1, beta2, eps, weight_decay, maximize, steps, scale, skip, list, capacity] : parts) {
    run(*plan, AdamW{lr, beta1, beta2, eps, weight_decay, maximize}, steps.data(), scale, skip, CodeList{list, capacity});
    plan->stashed = false;
  }
}

void bind_cpu(py::module_ cpu) {
  bind_cpu_lists(cpu.def_submodule("lists"));
  cpu.def("kl_loss", &kl_loss, py::arg("jensen_shannon"), py::arg("clean"), py::arg("noised"), py::arg("mask"),
          py::arg("reduction"));
  cpu.def("isa", &cpu::isa);
  cpu.def("isas", &cpu::isas);
  cpu.def("squared_norm", &squared_norm, py::arg("plan"), py::arg("adaptive"), py::arg("eta"));
  cpu.def(
      "chunk_squares",
      [](const Plan& plan, Pointer sums, int threads) { released(plan, [&] { cpu::chunk_squares(plan, sums, threads); }); },
      py::arg("plan"), py::arg("sums"), py::arg("threads"));
  cpu.def(
      "squared_distance",
      [](const Plan& plan, int threads) { return as_tensor(plan, [&] { return cpu::squared_distance(plan, threads); }); },
      py::arg("plan"), py::arg("threads"));
  cpu.def(
      "dot", [](const Plan& plan, int threads) { return as_tensor(plan, [&] { return cpu::dot(plan, threads); }); },
      py::arg("plan"), py::arg("threads"));
  cpu.def("sam_perturb", &sam_perturb, py::arg("plan"), py::arg("squared_norm"), py::arg("rho"), py::arg("adaptive"),
          py::arg("eta"), py::arg("compute_dtype"), py::arg("seed"));
  cpu.def(
      "sam_perturb_coded",
      [](Plan& plan, py::handle squared_norm, double rho, bool adaptive, double eta, py::handle compute_dtype,
         py::handle seed, Pointer list, int64_t capacity, bool pending) {
        const PerturbCall call(plan, squared_norm, rho, adaptive, eta, compute_dtype, seed);
        return as_tensor(plan, [&] {
          const PerturbSums sums =
              cpu::sam_perturb_coded(plan, call.how, call.squared, call.seed(), {list, capacity}, pending, call.threads);
          plan.stashed = true;
          return sums;
        });
      },
      py::arg("plan"), py::arg("squared_norm"), py::arg("rho"), py::arg("adaptive"), py::arg("eta"),
      py::arg("compute_dtype"), py::arg("seed"), py::arg("list"), py::arg("capacity"), py::arg("pending"));
  cpu.def(
      "sam_decode",
      [](Plan& plan, Pointer list, int64_t capacity, int threads) {
        released(plan, [&] {
          cpu::sam_decode(plan, {list, capacity}, threads);
          plan.stashed = false;
        });
      },
      py::arg("plan"), py::arg("list"), py::arg("capacity"), py::arg("threads"));
  cpu.def(
      "sam_perturb_masters",
      [](const Plan& plan, py::handle squared_norm, double rho, bool adaptive, double eta, py::handle compute_dtype) {
        const PerturbCall call(plan, squared_norm, rho, adaptive, eta, compute_dtype, py::none());
        return as_tensor(plan, [&] { return cpu::sam_perturb_masters(plan, call.how, call.squared, call.threads); });
      },
      py::arg("plan"), py::arg("squared_norm"), py::arg("rho"), py::arg("adaptive"), py::arg("eta"),
      py::arg("compute_dtype"));
  cpu.def(
      "sam_cast", [](const Plan& plan, int threads) { released(plan, [&] { cpu::sam_cast(plan, threads); }); },
      py::arg("plan"), py::arg("threads"));
  cpu.def("sam_restore", &sam_restore, py::arg("plan"));
  cpu.def(
      "sam_restore_adamw",
      [](const Plan& plan, double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
         const std::vector<double>& steps, double grad_scale, bool skip, int threads) {
        cpu::sam_restore_adamw(plan, {lr, beta1, beta2, eps, weight_decay, maximize}, steps.data(), grad_scale, skip,
                               threads);
      },
      py::arg("plan"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
      py::arg("maximize"), py::arg("steps"), py::arg("grad_scale"), py::arg("skip"), py::arg("threads"), Released());
  cpu.def(
      "sam_decode_adamw",
      [](const std::vector<DecodedStep<double, double, bool>>& parts, int threads) {
        for_decoded_steps(
            parts, [&](const Plan& plan, const AdamW& how, const double* steps, double scale, bool skip,
                       const CodeList& list) { cpu::sam_decode_adamw(plan, how, steps, scale, skip, list, threads); });
      },
      py::arg("parts"), py::arg("threads"), Released());
  cpu.def(
      "negate", [](const Plan& plan, int threads) { released(plan, [&] { cpu::negate(plan, threads); }); }, py::arg("plan"),
      py::arg("threads"));
  cpu.def("flip_signs", &cpu::flip_signs, py::arg("plan"), py::arg("seed"), py::arg("threads"), Released());
  cpu.def(
      "negate_norm",
      [](const Plan& plan, int threads) { return as_tensor(plan, [&] { return cpu::negate_norm(plan, threads); }); },
      py::arg("plan"), py::arg("threads"));
  cpu.def("negate_clip", &cpu::negate_clip, py::arg("plan"), py::arg("squared_norm"), py::arg("max_norm"),
          py::arg("threads"), Released());
  cpu.def(
      "add_noise",
      [](Pointer x, Pointer out, DType in_dtype, DType out_dtype, int64_t n, double eps, NoiseType type, uint64_t seed,
         Pointer rows, Pointer scales, int64_t row_length, int threads) {
        cpu::add_noise(x, out, in_dtype, out_dtype, n, eps, type, seed, rows, scales, row_length, threads);
      },
      py::arg("x"), py::arg("out"), py::arg("in_dtype"), py::arg("out_dtype"), py::arg("n"), py::arg("eps"), py::arg("type"),
      py::arg("seed"), py::arg("rows"), py::arg("scales"), py::arg("row_length"), py::arg("threads"), Released());
  cpu.def(
      "embedding_noise",
      [](Pointer table, Pointer ids, Pointer clean, Pointer noised, DType table_dtype, DType noised_dtype, int64_t tokens,
         int64_t width, int64_t table_stride, double eps, NoiseType type, uint64_t seed, Pointer rows, Pointer scales,
         int threads) {
        cpu::embedding_noise(table, ids, clean, noised, table_dtype, noised_dtype, tokens, width, table_stride, eps, type,
                             seed, rows, scales, threads);
      },
      py::arg("table"), py::arg("ids"), py::arg("clean"), py::arg("noised"), py::arg("table_dtype"), py::arg("noised_dtype"),
      py::arg("tokens"), py::arg("width"), py::arg("table_stride"), py::arg("eps"), py::arg("type"), py::arg("seed"),
      py::arg("rows"), py::arg("scales"), py::arg("threads"), Released());
  cpu.def(
      "row_losses",
      [](bool jensen_shannon, py::handle clean, py::handle noised, py::handle labels, py::handle mask, int64_t ignore_index,
         double kl_scale, double ce_scale, bool averaged, bool kl_everywhere, double kl_weight, py::handle grad_clean,
         py::handle grad_noised, int threads) -> py::object {
        RowTensors t;
        RowLosses losses = {};
        if (read_rows(clean.ptr(), noised.ptr(), labels.ptr(), mask.ptr(), grad_clean.ptr(), grad_noised.ptr(), t)) {
          const RowReduction how{kl_scale, ce_scale, averaged, kl_everywhere, kl_weight};
          std::optional<py::gil_scoped_release> release;
          if (t.rows * t.cols >= kWorthReleasing) release.emplace();
          losses = cpu::row_losses(jensen_shannon, t.clean, t.noised, t.grad_clean, t.grad_noised, t.dtype, t.rows, t.cols,
                                   t.labels, ignore_index, t.mask, how, threads);
        }
        if (!losses.served || !(losses.divergences.empty() || t.in_place())) return py::none();
        const auto scalar = [](double value) {
          PyObject* tensor = float32_scalar(value);
          if (tensor == nullptr) throw py::error_already_set();
          return py::reinterpret_steal<py::object>(tensor);
        };
        py::list found;
        found.append(scalar(losses.loss));
        if (t.labels != nullptr) {
          found.append(scalar(losses.task));
          found.append(scalar(losses.divergence));
        }
        if (!losses.divergences.empty()) found.append(losses.divergences);
        return py::tuple(found);
      },
      py::arg("jensen_shannon"), py::arg("clean"), py::arg("noised"), py::arg("labels"), py::arg("mask"),
      py::arg("ignore_index"), py::arg("kl_scale"), py::arg("ce_scale"), py::arg("averaged"), py::arg("kl_everywhere"),
      py::arg("kl_weight"), py::arg("grad_clean"), py::arg("grad_noised"), py::arg("threads"));
  cpu.def(
      "scale_gradients",
      [](py::handle first, py::handle second, py::handle factor, int threads) {
        RowTensors t;
        const float* by = nullptr;
        if (!read_gradients(first.ptr(), second.ptr(), factor.ptr(), t, by)) return false;
        std::optional<py::gil_scoped_release> release;
        if (*by != 1 && t.rows * t.cols >= kWorthReleasing) release.emplace();
        cpu::scale_gradients(t.grad_clean, t.grad_noised, t.dtype, t.rows, t.cols, by, threads);
        return true;
      },
      py::arg("first"), py::arg("second"), py::arg("factor"), py::arg("threads"));
  cpu.def(
      "advise_huge_pages", [](Pointer address, int64_t bytes) { return cpu::advise_huge_pages(address, bytes); },
      py::arg("address"), py::arg("bytes"));
}

std::vector<PyObject*> kept(const py::tuple& objects) {
  std::vector<PyObject*> list;
  for (const py::handle object : objects) list.push_back(object.inc_ref().ptr());
  return list;
}

void bind_tensors(py::module_ m) {
  m.def(
      "attach",
      [](py::object exchange, py::tuple plain, py::tuple observers, py::object grad_enabled, py::object set_grad_enabled,
         py::object function_modes, py::object past_modes, py::object increment_version, py::object float64_tensor,
         py::object is_neg, py::object num_threads, py::tuple dtypes) {
        attach({exchange.release().ptr(), kept(plain), kept(observers), grad_enabled.release().ptr(),
                set_grad_enabled.release().ptr(), function_modes.release().ptr(), past_modes.release().ptr(),
                increment_version.release().ptr(), float64_tensor.release().ptr(), is_neg.release().ptr(),
                num_threads.release().ptr(), kept(dtypes)});
      },
      py::arg("exchange"), py::arg("plain"), py::arg("observers"), py::arg("grad_enabled"), py::arg("set_grad_enabled"),
      py::arg("function_modes"), py::arg("past_modes"), py::arg("increment_version"), py::arg("float64_tensor"),
      py::arg("is_neg"), py::arg("num_threads"), py::arg("dtypes"));
  m.def(
      "without_grad",
      [](py::handle function, py::tuple arguments, py::dict keywords) {
        PyObject* found = without_grad(function.ptr(), arguments.ptr(), keywords.ptr());
        if (found == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(found);
      },
      py::arg("function"), py::arg("arguments"), py::arg("keywords"));
  m.def("needs_dispatcher", [](py::tuple arguments) { return needs_dispatcher(arguments.ptr()); }, py::arg("arguments"));
  py::class_<TensorLists>(m, "TensorLists")
      .def(py::init(
               [](py::tuple columns, unsigned written, bool held) { return new TensorLists(columns.ptr(), written, held); }),
           py::arg("columns"), py::arg("written"), py::arg("held") = false)
      .def("bind", &TensorLists::bind, py::arg("plan"), py::arg("rows"), py::arg("names"), py::keep_alive<1, 2>())
      .def(
          "refresh", [](TensorLists& lists, py::tuple columns) { return lists.refresh(columns.ptr(), false); },
          py::arg("columns"))
      .def(
          "take_gradients",
          [](TensorLists& lists, TensorLists& gradients, py::list weights) {
            PyObject* found = lists.take_gradients(gradients, weights.ptr());
            if (found == nullptr) throw py::error_already_set();
            return py::reinterpret_steal<py::object>(found);
          },
          py::arg("gradients"), py::arg("weights"))
      .def_property_readonly("moved", &TensorLists::moved)
      .def("require_alive", [](TensorLists& lists, py::handle weak) { lists.require_alive(weak.ptr()); }, py::arg("weak"));
  m.def(
      "gradients_of",
      [](py::list tensors) {
        PyObject* found = gradients_of(tensors.ptr());
        if (found == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(found);
      },
      py::arg("tensors"));
  py::class_<Selection>(m, "Selection")
      .def(py::init([](py::list tensors, bool gradient) { return new Selection(tensors.ptr(), gradient); }),
           py::arg("tensors"), py::arg("gradient"))
      .def(
          "same_tensors", [](const Selection& selection, py::list lists) { return selection.same_tensors(lists.ptr()); },
          py::arg("lists"))
      .def("same", [](const Selection& selection, py::list lists) { return selection.same(lists.ptr()); }, py::arg("lists"));
  py::class_<ListPlans>(m, "ListPlans")
      .def(py::init<unsigned, size_t>(), py::arg("written"), py::arg("capacity"))
      .def(
          "call",
          [](ListPlans& plans, py::tuple columns, py::tuple arguments, py::handle backend) {
            PyObject* result = plans.call(columns.ptr(), arguments.ptr(), backend.ptr());
            if (result == nullptr) throw py::error_already_set();
            return py::reinterpret_steal<py::object>(result);
          },
          py::arg("columns"), py::arg("arguments"), py::arg("backend"))
      .def(
          "keep",
          [](ListPlans& plans, py::object lists, py::handle serve, py::handle buckets, py::handle backend) {
            plans.keep(lists.cast<TensorLists*>(), lists.ptr(), serve.ptr(), buckets.ptr(), backend.ptr());
          },
          py::arg("lists"), py::arg("serve"), py::arg("buckets"), py::arg("backend"));
}

#ifdef FASTPOST_WITH_CUDA
// The addresses of a SumRoom, in its order.
using Room = std::tuple<Pointer, Pointer, Pointer>;

cuda::SumRoom sum_room(const Room& room) { return {std::get<0>(room), std::get<1>(room), std::get<2>(room)}; }

void bind_cuda(py::module_ cuda) {
  cuda.def("device_count", &cuda::device_count);
  cuda.def("supports", &cuda::supports, py::arg("device"));
  cuda.def(
      "squared_norm",
      [](const Plan& plan, bool adaptive, double eta, Room room, int device, Pointer stream) {
        cuda::squared_norm(plan, adaptive, eta, sum_room(room), device, stream);
      },
      py::arg("plan"), py::arg("adaptive"), py::arg("eta"), py::arg("room"), py::arg("device"), py::arg("stream"),
      Released());
  cuda.def(
      "squared_distance",
      [](const Plan& plan, Room room, int device, Pointer stream) {
        cuda::squared_distance(plan, sum_room(room), device, stream);
      },
      py::arg("plan"), py::arg("room"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "dot",
      [](const Plan& plan, Room room, int device, Pointer stream) { cuda::dot(plan, sum_room(room), device, stream); },
      py::arg("plan"), py::arg("room"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "sam_perturb",
      [](Plan& plan, double rho, bool adaptive, double eta, DType compute_dtype, Pointer squared_norm, Pointer seed,
         Room room, int device, Pointer stream) {
        cuda::sam_perturb(plan, {rho, adaptive, eta, compute_dtype}, squared_norm, seed, sum_room(room), device, stream);
        plan.stashed = true;
      },
      py::arg("plan"), py::arg("rho"), py::arg("adaptive"), py::arg("eta"), py::arg("compute_dtype"),
      py::arg("squared_norm"), py::arg("seed"), py::arg("room"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "sam_perturb_coded",
      [](Plan& plan, double rho, bool adaptive, double eta, DType compute_dtype, Pointer squared_norm, Pointer seed,
         Pointer list, int64_t capacity, Room room, int device, Pointer stream) {
        cuda::sam_perturb_coded(plan, {rho, adaptive, eta, compute_dtype}, squared_norm, seed, {list, capacity},
                                sum_room(room), device, stream);
        plan.stashed = true;
      },
      py::arg("plan"), py::arg("rho"), py::arg("adaptive"), py::arg("eta"), py::arg("compute_dtype"),
      py::arg("squared_norm"), py::arg("seed"), py::arg("list"), py::arg("capacity"), py::arg("room"), py::arg("device"),
      py::arg("stream"), Released());
  cuda.def(
      "sam_perturb_pending",
      [](const Plan& plan, double rho, bool adaptive, double eta, DType compute_dtype, Pointer squared_norm, Pointer seed,
         Pointer list, int64_t capacity, int device, Pointer stream) {
        cuda::sam_perturb_pending(plan, {rho, adaptive, eta, compute_dtype}, squared_norm, seed, {list, capacity}, device,
                                  stream);
      },
      py::arg("plan"), py::arg("rho"), py::arg("adaptive"), py::arg("eta"), py::arg("compute_dtype"),
      py::arg("squared_norm"), py::arg("seed"), py::arg("list"), py::arg("capacity"), py::arg("device"), py::arg("stream"),
      Released());
  cuda.def(
      "sam_decode",
      [](Plan& plan, Pointer list, int64_t capacity, int device, Pointer stream) {
        cuda::sam_decode(plan, {list, capacity}, device, stream);
        plan.stashed = false;
      },
      py::arg("plan"), py::arg("list"), py::arg("capacity"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "sam_perturb_masters",
      [](const Plan& plan, double rho, bool adaptive, double eta, DType compute_dtype, Pointer squared_norm, Room room,
         int device, Pointer stream) {
        cuda::sam_perturb_masters(plan, {rho, adaptive, eta, compute_dtype}, squared_norm, sum_room(room), device, stream);
      },
      py::arg("plan"), py::arg("rho"), py::arg("adaptive"), py::arg("eta"), py::arg("compute_dtype"),
      py::arg("squared_norm"), py::arg("room"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "sam_cast", [](const Plan& plan, int device, Pointer stream) { cuda::sam_cast(plan, device, stream); },
      py::arg("plan"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "sam_restore", [](const Plan& plan, int device, Pointer stream) { cuda::sam_restore(plan, device, stream); },
      py::arg("plan"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "sam_restore_adamw",
      [](const Plan& plan, double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
         const std::vector<Pointer>& steps, Pointer grad_scale, Pointer found_inf, int device, Pointer stream) {
        cuda::sam_restore_adamw(plan, {lr, beta1, beta2, eps, weight_decay, maximize},
                                reinterpret_cast<const float* const*>(steps.data()), grad_scale, found_inf, device, stream);
      },
      py::arg("plan"), py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"),
      py::arg("maximize"), py::arg("steps"), py::arg("grad_scale"), py::arg("found_inf"), py::arg("device"),
      py::arg("stream"), Released());
  cuda.def(
      "sam_decode_adamw",
      [](const std::vector<DecodedStep<Pointer, Pointer, Pointer>>& parts,
         const std::vector<std::pair<int, Pointer>>& where) {
        size_t part = 0;
        for_decoded_steps(parts, [&](const Plan& plan, const AdamW& how, const Pointer* steps, Pointer scale,
                                     Pointer found_inf, const CodeList& list) {
          const auto [device, stream] = where.at(part++);
          cuda::sam_decode_adamw(plan, how, reinterpret_cast<const float* const*>(steps), scale, found_inf, list, device,
                                 stream);
        });
      },
      py::arg("parts"), py::arg("where"), Released());
  cuda.def(
      "negate", [](const Plan& plan, int device, Pointer stream) { cuda::negate(plan, device, stream); }, py::arg("plan"),
      py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "flip_signs",
      [](const Plan& plan, Pointer seed, int device, Pointer stream) { cuda::flip_signs(plan, seed, device, stream); },
      py::arg("plan"), py::arg("seed"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "negate_norm",
      [](const Plan& plan, Room room, int device, Pointer stream) {
        cuda::negate_norm(plan, sum_room(room), device, stream);
      },
      py::arg("plan"), py::arg("room"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "negate_clip",
      [](const Plan& plan, Pointer squared_norm, double max_norm, int device, Pointer stream) {
        cuda::negate_clip(plan, squared_norm, max_norm, device, stream);
      },
      py::arg("plan"), py::arg("squared_norm"), py::arg("max_norm"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "add_noise",
      [](Pointer x, Pointer out, DType in_dtype, DType out_dtype, int64_t n, double eps, NoiseType type, Pointer seed,
         Pointer rows, Pointer scales, int64_t row_length, int device, Pointer stream) {
        cuda::add_noise(x, out, in_dtype, out_dtype, n, eps, type, seed, rows, scales, row_length, device, stream);
      },
      py::arg("x"), py::arg("out"), py::arg("in_dtype"), py::arg("out_dtype"), py::arg("n"), py::arg("eps"), py::arg("type"),
      py::arg("seed"), py::arg("rows"), py::arg("scales"), py::arg("row_length"), py::arg("device"), py::arg("stream"),
      Released());
  cuda.def(
      "embedding_noise",
      [](Pointer table, Pointer ids, Pointer clean, Pointer noised, DType table_dtype, DType noised_dtype, int64_t tokens,
         int64_t table_rows, int64_t width, int64_t table_stride, double eps, NoiseType type, Pointer seed, Pointer rows,
         Pointer scales, int device, Pointer stream) {
        cuda::embedding_noise(table, ids, clean, noised, table_dtype, noised_dtype, tokens, table_rows, width, table_stride,
                              eps, type, seed, rows, scales, device, stream);
      },
      py::arg("table"), py::arg("ids"), py::arg("clean"), py::arg("noised"), py::arg("table_dtype"), py::arg("noised_dtype"),
      py::arg("tokens"), py::arg("table_rows"), py::arg("width"), py::arg("table_stride"), py::arg("eps"), py::arg("type"),
      py::arg("seed"), py::arg("rows"), py::arg("scales"), py::arg("device"), py::arg("stream"), Released());
  cuda.def(
      "row_losses",
      [](py::handle clean, py::handle noised, py::handle labels, py::handle mask, int64_t ignore_index, double kl_scale,
         double ce_scale, bool averaged, bool kl_everywhere, double kl_weight, py::handle grad_clean, py::handle grad_noised,
         Pointer items, Pointer room, Pointer loss, Pointer task, Pointer divergence, int device, Pointer stream) {
        RowTensors t;
        if (!read_rows(clean.ptr(), noised.ptr(), labels.ptr(), mask.ptr(), grad_clean.ptr(), grad_noised.ptr(), t))
          return false;
        const RowReduction how{kl_scale, ce_scale, averaged, kl_everywhere, kl_weight};
        py::gil_scoped_release release;
        cuda::row_losses(t.clean, t.noised, t.grad_clean, t.grad_noised, t.dtype, t.rows, t.cols, t.labels, ignore_index,
                         t.mask, how, items, room, loss, task, divergence, device, stream);
        return true;
      },
      py::arg("clean"), py::arg("noised"), py::arg("labels"), py::arg("mask"), py::arg("ignore_index"), py::arg("kl_scale"),
      py::arg("ce_scale"), py::arg("averaged"), py::arg("kl_everywhere"), py::arg("kl_weight"), py::arg("grad_clean"),
      py::arg("grad_noised"), py::arg("items"), py::arg("room"), py::arg("loss"), py::arg("task"), py::arg("divergence"),
      py::arg("device"), py::arg("stream"));
  cuda.def(
      "scale_gradients",
      [](py::handle first, py::handle second, py::handle factor, int device, Pointer stream) {
        RowTensors t;
        const float* by = nullptr;
        if (!read_gradients(first.ptr(), second.ptr(), factor.ptr(), t, by)) return false;
        py::gil_scoped_release release;
        cuda::scale_gradients(t.grad_clean, t.grad_noised, t.dtype, t.rows, t.cols, by, device, stream);
        return true;
      },
      py::arg("first"), py::arg("second"), py::arg("factor"), py::arg("device"), py::arg("stream"));
}
#endif

}  // namespace
}  // namespace fastpost

using namespace fastpost;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fastpost's native core: raw addresses in, numbers out. Use fastpost.ops instead.";
  m.attr("version") = FASTPOST_VERSION;

  // Not native enums: of those pybind11 asks the value in Python at every call, which takes longer than a small kernel.
  py::enum_<DType>(m, "DType").value("f32", DType::f32).value("bf16", DType::bf16).value("f16", DType::f16);
  py::enum_<Divergence>(m, "Divergence")
      .value("forward_kl", Divergence::forward_kl)
      .value("reverse_kl", Divergence::reverse_kl)
      .value("symmetric_kl", Divergence::symmetric_kl)
      .value("js", Divergence::js)
      .value("total_variation", Divergence::total_variation);
  py::enum_<NoiseType>(m, "NoiseType").value("uniform", NoiseType::uniform).value("normal", NoiseType::normal);
  py::enum_<Column>(m, "Column")
      .value("weight", kWeight)
      .value("grad", kGrad)
      .value("stash", kStash)
      .value("first", kFirst)
      .value("second", kSecond);
  py::class_<Plan>(m, "Plan")
      .def(py::init<DType, std::vector<int64_t>, std::vector<int64_t>>(), py::arg("dtype"), py::arg("numels"),
           py::arg("streams"))
      .def("point", &Plan::point, py::arg("column"), py::arg("addresses"), py::arg("padded"))
      .def_readwrite("stashed", &Plan::stashed)
      .def_property_readonly("elements", [](const Plan& plan) { return plan.elements(); })
      .def_property_readonly("chunks", [](const Plan& plan) { return plan.chunks().size(); })
      .def(
          "spans", [](const Plan& plan, int column_mask) { return plan.spans(column_mask).size(); }, py::arg("column_mask"))
      .def("chunk_list",
           [](const Plan& plan) {
             std::vector<std::array<int64_t, 3>> list;  // tensor, first element, length
             for (const Chunk& chunk : plan.chunks()) list.push_back({chunk.tensor, chunk.begin, chunk.length});
             return list;
           })
      .def("task_list", [](const Plan& plan) { return plan.tasks(); })
      .def(
          "chunk_addresses",
          [](const Plan& plan, Column column) {
            plan.require(column);
            std::vector<uintptr_t> list;
            for (const Chunk& chunk : plan.chunks()) list.push_back(reinterpret_cast<uintptr_t>(plan.at(column, chunk)));
            return list;
          },
          py::arg("column"))
      .def(
          "span_list",
          [](const Plan& plan, int column_mask) {
            std::vector<std::pair<std::vector<uintptr_t>, int64_t>> list;  // addresses in the mask's columns, bytes
            for (const Span& span : plan.spans(column_mask)) {
              list.push_back({{}, span.bytes});
              for (int c = 0; c < kColumns; ++c)
                if (column_mask & 1 << c) list.back().first.push_back(reinterpret_cast<uintptr_t>(span.base[c]));
            }
            return list;
          },
          py::arg("column_mask"));
  m.attr("TENSOR_ALIGNMENT") = kTensorAlignment;
  m.attr("SHARD_SUMS") = cuda::kShardSums;
  m.attr("SHARD_NO_CLASS") = cuda::kShardNoClass;
  m.attr("SHARD_IGNORED") = cuda::kShardIgnored;

  bind_tensors(m);
  py::module_ cpu = m.def_submodule("cpu");
  bind_cpu(cpu);
  bind_cpu_rows(cpu);
#ifdef FASTPOST_WITH_CUDA
  py::module_ cuda = m.def_submodule("cuda");
  bind_cuda(cuda);
  bind_cuda_rows(cuda);
#endif
}
