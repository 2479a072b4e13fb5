// Rows of logits for Python: one definition for both cores, whose functions differ in what they are told last, threads or a
// device and its stream.
#include "bindings.h"

namespace fastpost {
namespace {

// An argument with its name.
template <class T>
struct Named {
  const char* name;
};

constexpr Named<int> kThreads{"threads"}, kDevice{"device"};
constexpr Named<Pointer> kStream{"stream"}, kKnownLogits{"known_logits"};

template <auto function, class... Where>
void def_divergence_rows(py::module_& m, const Named<Where>&... where) {
  m.def(
      "divergence_rows",
      [](Pointer clean, int64_t clean_stride, Pointer noised, int64_t noised_stride, Pointer grad_clean,
         int64_t grad_clean_stride, Pointer grad_noised, int64_t grad_noised_stride, DType dtype, int64_t rows, int64_t cols,
         Pointer labels, int64_t ignore_index, Pointer kl_weights, Pointer ce_weights, Pointer kl, Pointer ce, Where... at) {
        function({clean, clean_stride}, {noised, noised_stride}, {grad_clean, grad_clean_stride},
                 {grad_noised, grad_noised_stride}, dtype, rows, cols, labels, ignore_index, kl_weights, ce_weights, kl, ce,
                 at...);
      },
      py::arg("clean"), py::arg("clean_stride"), py::arg("noised"), py::arg("noised_stride"), py::arg("grad_clean"),
      py::arg("grad_clean_stride"), py::arg("grad_noised"), py::arg("grad_noised_stride"), py::arg("dtype"), py::arg("rows"),
      py::arg("cols"), py::arg("labels"), py::arg("ignore_index"), py::arg("kl_weights"), py::arg("ce_weights"),
      py::arg("kl"), py::arg("ce"), py::arg(where.name)..., Released());
}

template <auto function, class... Where>
void def_operand_rows(py::module_& m, const Named<Where>&... where) {
  m.def(
      "operand_rows",
      [](Pointer clean, int64_t clean_stride, Pointer noised, int64_t noised_stride, Pointer first, int64_t first_stride,
         Pointer second, int64_t second_stride, DType operand_dtype, int64_t rows, int64_t cols, Pointer labels,
         int64_t ignore_index, Pointer kl_weights, Pointer ce_weights, double smoothing, double cap, bool teaches,
         bool noised_classifies, bool mixture, Pointer kl, Pointer ce, Where... at) {
        function({clean, clean_stride}, {noised, noised_stride}, {first, first_stride}, {second, second_stride},
                 operand_dtype, rows, cols, labels, ignore_index, kl_weights, ce_weights,
                 {smoothing, cap, teaches, noised_classifies, mixture}, kl, ce, at...);
      },
      py::arg("clean"), py::arg("clean_stride"), py::arg("noised"), py::arg("noised_stride"), py::arg("first"),
      py::arg("first_stride"), py::arg("second"), py::arg("second_stride"), py::arg("operand_dtype"), py::arg("rows"),
      py::arg("cols"), py::arg("labels"), py::arg("ignore_index"), py::arg("kl_weights"), py::arg("ce_weights"),
      py::arg("smoothing"), py::arg("cap"), py::arg("teaches"), py::arg("noised_classifies"), py::arg("mixture"),
      py::arg("kl"), py::arg("ce"), py::arg(where.name)..., Released());
}

template <auto function, class... Where>
void def_distillation_rows(py::module_& m, const Named<Where>&... where) {
  m.def(
      "distillation_rows",
      [](Pointer teacher, int64_t teacher_stride, Pointer student, int64_t student_stride, Pointer grad_teacher,
         int64_t grad_teacher_stride, Pointer grad_student, int64_t grad_student_stride, DType operand_dtype, int64_t rows,
         int64_t cols, Pointer labels, int64_t ignore_index, Pointer weights, Pointer ce_weights, Divergence divergence,
         double beta, double temperature, double teacher_cap, double student_cap, double smoothing, Pointer value,
         Pointer ce, Where... at) {
        function({teacher, teacher_stride}, {student, student_stride}, {grad_teacher, grad_teacher_stride},
                 {grad_student, grad_student_stride}, operand_dtype, rows, cols, labels, ignore_index, weights, ce_weights,
                 {divergence, beta, temperature, teacher_cap, student_cap, smoothing}, value, ce, at...);
      },
      py::arg("teacher"), py::arg("teacher_stride"), py::arg("student"), py::arg("student_stride"), py::arg("grad_teacher"),
      py::arg("grad_teacher_stride"), py::arg("grad_student"), py::arg("grad_student_stride"), py::arg("operand_dtype"),
      py::arg("rows"), py::arg("cols"), py::arg("labels"), py::arg("ignore_index"), py::arg("weights"),
      py::arg("ce_weights"), py::arg("divergence"), py::arg("beta"), py::arg("temperature"), py::arg("teacher_cap"),
      py::arg("student_cap"), py::arg("smoothing"), py::arg("value"), py::arg("ce"), py::arg(where.name)..., Released());
}

template <auto function, class... Where>
void def_top_k_rows(py::module_& m, const Named<Where>&... where) {
  m.def(
      "top_k_rows",
      [](Pointer logits, int64_t logits_stride, Pointer grad, int64_t grad_stride, DType operand_dtype, int64_t rows,
         int64_t cols, Pointer ids, Pointer log_probs, int64_t classes, bool teacher_has_rest, Pointer labels,
         int64_t ignore_index, Pointer weights, Pointer ce_weights, Divergence divergence, double beta, double temperature,
         double cap, double smoothing, bool has_rest, Pointer value, Pointer ce, Where... at) {
        function({logits, logits_stride}, {grad, grad_stride}, operand_dtype, rows, cols,
                 {ids, log_probs, classes, teacher_has_rest}, labels, ignore_index, weights, ce_weights,
                 {divergence, beta, temperature, cap, smoothing, has_rest}, value, ce, at...);
      },
      py::arg("logits"), py::arg("logits_stride"), py::arg("grad"), py::arg("grad_stride"), py::arg("operand_dtype"),
      py::arg("rows"), py::arg("cols"), py::arg("ids"), py::arg("log_probs"), py::arg("classes"),
      py::arg("teacher_has_rest"), py::arg("labels"), py::arg("ignore_index"), py::arg("weights"), py::arg("ce_weights"),
      py::arg("divergence"), py::arg("beta"), py::arg("temperature"), py::arg("cap"), py::arg("smoothing"),
      py::arg("has_rest"), py::arg("value"), py::arg("ce"), py::arg(where.name)..., Released());
}

template <auto function, class... Where>
void def_scale_rows(py::module_& m, const Named<Where>&... where) {
  m.def(
      "scale_rows",
      [](Pointer block, int64_t stride, DType dtype, int64_t rows, int64_t cols, Pointer factors, int64_t factor_stride,
         Where... at) { function({block, stride}, dtype, rows, cols, factors, factor_stride, at...); },
      py::arg("block"), py::arg("stride"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("factors"),
      py::arg("factor_stride"), py::arg(where.name)..., Released());
}

}  // namespace

void bind_cpu_rows(py::module_& m) {
  def_divergence_rows<&cpu::divergence_rows>(m, kThreads);
  def_operand_rows<&cpu::operand_rows>(m, kThreads);
  def_distillation_rows<&cpu::distillation_rows>(m, kThreads);
  def_top_k_rows<&cpu::top_k_rows>(m, kThreads);
  def_scale_rows<&cpu::scale_rows>(m, kThreads);
  m.def(
      "js_rows",
      [](Pointer clean, int64_t clean_stride, Pointer noised, int64_t noised_stride, Pointer grad_clean,
         int64_t grad_clean_stride, Pointer grad_noised, int64_t grad_noised_stride, DType dtype, int64_t rows, int64_t cols,
         Pointer weights, Pointer value, int threads) {
        cpu::js_rows({clean, clean_stride}, {noised, noised_stride}, {grad_clean, grad_clean_stride},
                     {grad_noised, grad_noised_stride}, dtype, rows, cols, weights, value, threads);
      },
      py::arg("clean"), py::arg("clean_stride"), py::arg("noised"), py::arg("noised_stride"), py::arg("grad_clean"),
      py::arg("grad_clean_stride"), py::arg("grad_noised"), py::arg("grad_noised_stride"), py::arg("dtype"), py::arg("rows"),
      py::arg("cols"), py::arg("weights"), py::arg("value"), py::arg("threads"), Released());
}

#ifdef FASTPOST_WITH_CUDA
void bind_cuda_rows(py::module_& m) {
  def_divergence_rows<&cuda::divergence_rows>(m, kDevice, kStream);
  def_operand_rows<&cuda::operand_rows>(m, kDevice, kStream);
  def_distillation_rows<&cuda::distillation_rows>(m, kDevice, kStream);
  def_top_k_rows<&cuda::top_k_rows>(m, kKnownLogits, kDevice, kStream);
  def_scale_rows<&cuda::scale_rows>(m, kDevice, kStream);
  m.def(
      "shard_sums",
      [](Pointer clean, int64_t clean_stride, Pointer noised, int64_t noised_stride, int64_t rows, int64_t cols,
         Pointer tops, Pointer labels, Pointer kl_weights, Pointer ce_weights, Pointer before, Pointer sums, int device,
         Pointer stream) {
        cuda::shard_sums({clean, clean_stride}, {noised, noised_stride}, rows, cols, {tops, labels, kl_weights, ce_weights},
                         before, sums, device, stream);
      },
      py::arg("clean"), py::arg("clean_stride"), py::arg("noised"), py::arg("noised_stride"), py::arg("rows"),
      py::arg("cols"), py::arg("tops"), py::arg("labels"), py::arg("kl_weights"), py::arg("ce_weights"), py::arg("before"),
      py::arg("sums"), py::arg("device"), py::arg("stream"), Released());
  m.def(
      "shard_operands",
      [](Pointer clean, int64_t clean_stride, Pointer noised, int64_t noised_stride, Pointer first, int64_t first_stride,
         Pointer second, int64_t second_stride, DType operand_dtype, int64_t rows, int64_t cols, Pointer tops,
         Pointer labels, Pointer kl_weights, Pointer ce_weights, Pointer before, Pointer sums, Pointer vocab,
         double smoothing, double cap, bool teaches, Pointer kl, Pointer ce, int device, Pointer stream) {
        cuda::shard_operands({clean, clean_stride}, {noised, noised_stride}, {first, first_stride}, {second, second_stride},
                             operand_dtype, rows, cols, {tops, labels, kl_weights, ce_weights}, before, sums, vocab,
                             {smoothing, cap, teaches, false, false}, kl, ce, device, stream);
      },
      py::arg("clean"), py::arg("clean_stride"), py::arg("noised"), py::arg("noised_stride"), py::arg("first"),
      py::arg("first_stride"), py::arg("second"), py::arg("second_stride"), py::arg("operand_dtype"), py::arg("rows"),
      py::arg("cols"), py::arg("tops"), py::arg("labels"), py::arg("kl_weights"), py::arg("ce_weights"), py::arg("before"),
      py::arg("sums"), py::arg("vocab"), py::arg("smoothing"), py::arg("cap"), py::arg("teaches"), py::arg("kl"),
      py::arg("ce"), py::arg("device"), py::arg("stream"), Released());
}
#endif

}  // namespace fastpost
