// Python's view of the cuda backend: addresses, sizes and strides in, a status out. Tensors cross
// as addresses and the stream as an integer, so that one build serves every version of torch. The
// emulated build (RBM_EMULATED) is the same module for a CPU.
#include <pybind11/pybind11.h>

#include "cuda/ops/operations.h"

namespace py = pybind11;
using namespace rbm::cuda;

namespace {

using Address = uintptr_t;
template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

Matrix matrix(Address data, int element, int64_t rows, int64_t cols, int64_t row_stride,
              int64_t col_stride, bool binary) {
  return {at<const void>(data),
          static_cast<Element>(element),
          rows,
          cols,
          row_stride,
          col_stride,
          binary};
}

// Runs an operation twice: to learn how much memory it needs, and, with what `allocate` gave (a
// tensor of that many bytes), to launch it.
template <class Operation> int launch(int (*operation)(const Operation&, Call&), const Operation& a,
                                      Call call, const py::object& allocate) {
  const int status = operation(a, call);
  if (status) return status;
  const py::object workspace = allocate(call.workspace_bytes);
  call.workspace = at<void>(workspace.attr("data_ptr")().cast<Address>());
  const py::gil_scoped_release release;
  return operation(a, call);
}

int py_sample(Address given, int given_element, int64_t rows, int64_t K, int64_t given_stride,
              bool given_binary, Address weight, int weight_element, int64_t N, int64_t row_stride,
              int64_t col_stride, Address bias, Address given_log_var, Address drawn_log_var,
              float beta, Address betas, Address states, int states_element, Address means,
              Address seed, uint32_t chain_offset, int digits, const py::object& allocate,
              int device, Address stream) {
  const Sample a{matrix(given, given_element, rows, K, given_stride, 1, given_binary),
                 matrix(weight, weight_element, K, N, row_stride, col_stride, false),
                 at<const float>(bias),
                 at<const float>(given_log_var),
                 at<const float>(drawn_log_var),
                 {beta, at<const float>(betas)},
                 at<void>(states),
                 static_cast<Element>(states_element),
                 at<float>(means)};
  return launch(sample, a,
                {at<const int64_t>(seed), chain_offset, digits, device, at<void>(stream)},
                allocate);
}

int py_gibbs_sample(Address v, int v_element, int64_t rows, int64_t v_stride, bool v_binary,
                    Address W, int W_element, int64_t V, int64_t H, int64_t row_stride,
                    int64_t col_stride, Address b, Address c, int64_t k, Address log_var,
                    float beta, Address betas, Address mask, int64_t mask_stride, Address values,
                    int values_element, int64_t values_stride, bool values_binary, Address states,
                    int states_element, Address seed, uint32_t chain_offset, int digits,
                    const py::object& allocate, int device, Address stream) {
  const Gibbs a{matrix(v, v_element, rows, V, v_stride, 1, v_binary),
                matrix(W, W_element, V, H, row_stride, col_stride, false),
                at<const float>(b),
                at<const float>(c),
                k,
                at<const float>(log_var),
                {beta, at<const float>(betas)},
                at<const uint8_t>(mask),
                mask_stride,
                matrix(values, values_element, rows, V, values_stride, 1, values_binary),
                at<void>(states),
                static_cast<Element>(states_element)};
  return launch(gibbs_sample, a,
                {at<const int64_t>(seed), chain_offset, digits, device, at<void>(stream)},
                allocate);
}

int py_free_energy(Address v, int v_element, int64_t rows, int64_t v_stride, bool v_binary,
                   Address W, int W_element, int64_t V, int64_t H, int64_t row_stride,
                   int64_t col_stride, Address b, Address c, Address log_var, float beta,
                   Address betas, Address energies, int digits, const py::object& allocate,
                   int device, Address stream) {
  const FreeEnergy a{matrix(v, v_element, rows, V, v_stride, 1, v_binary),
                     matrix(W, W_element, V, H, row_stride, col_stride, false),
                     at<const float>(b),
                     at<const float>(c),
                     at<const float>(log_var),
                     {beta, at<const float>(betas)},
                     at<float>(energies)};
  return launch(free_energy, a, {nullptr, 0, digits, device, at<void>(stream)}, allocate);
}

int py_cd_step(Address v, int v_element, int64_t rows, int64_t v_stride, bool v_binary, Address W,
               int W_element, int64_t V, int64_t H, int64_t row_stride, int64_t col_stride,
               Address b, Address c, int64_t k, Address chains, int chains_element,
               int64_t n_chains, int64_t chains_stride, bool chains_binary, Address log_var,
               Address grad_W, int64_t grad_stride, Address grad_b, Address grad_c, bool accumulate,
               Address advanced, int advanced_element, Address energies, Address seed,
               uint32_t chain_offset, int digits, const py::object& allocate, int device,
               Address stream) {
  const CdStep a{matrix(v, v_element, rows, V, v_stride, 1, v_binary),
                 matrix(W, W_element, V, H, row_stride, col_stride, false),
                 at<const float>(b),
                 at<const float>(c),
                 k,
                 matrix(chains, chains_element, n_chains, V, chains_stride, 1, chains_binary),
                 at<const float>(log_var),
                 at<float>(grad_W),
                 grad_stride,
                 at<float>(grad_b),
                 at<float>(grad_c),
                 accumulate,
                 at<void>(advanced),
                 static_cast<Element>(advanced_element),
                 at<float>(energies)};
  return launch(cd_step, a,
                {at<const int64_t>(seed), chain_offset, digits, device, at<void>(stream)},
                allocate);
}

py::tuple py_device_count() {
  std::string error;
  const int count = device_count(error);
  return py::make_tuple(count, error);
}

}  // namespace

#ifdef RBM_EMULATED
PYBIND11_MODULE(_cuda_emulated, m) {
#else
PYBIND11_MODULE(_cuda, m) {
#endif
  m.doc() = "The kernels of rbm_kernels.backends.cuda, over raw addresses.";
  m.def("sample", &py_sample, "Launches the kernels; 0, or a status for error_string.");
  m.def("gibbs_sample", &py_gibbs_sample);
  m.def("free_energy", &py_free_energy);
  m.def("cd_step", &py_cd_step);
  m.def("regime", &regime, py::arg("rows"), py::arg("n_visible"), py::arg("n_hidden"),
        py::arg("sweeps"), py::arg("digits"), py::arg("gaussian"), py::arg("device"),
        "How that many chains and sweeps would be run on a device, in words.");
  m.def("device_count", &py_device_count,
        "How many CUDA devices there are, and the driver's words where there is none.");
  m.def("error_string", &error_string, py::arg("status"));
}
