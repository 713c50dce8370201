// The Python binding of the CUDA kernels. Tensors cross as addresses and the stream as an integer,
// so that one build serves every version of torch.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "sample.h"

namespace py = pybind11;

namespace {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

int sample_bernoulli(uintptr_t x, uintptr_t bias, float beta, uintptr_t seed, uint32_t chain_offset,
                     uint32_t stream_id, uint64_t half_sweep, int64_t batch, int64_t units,
                     uintptr_t states, uintptr_t probabilities, int device, uintptr_t stream) {
  const rbm::cuda::SampleArguments arguments{pointer<const float>(x),
                                             pointer<const float>(bias),
                                             beta,
                                             pointer<const int64_t>(seed),
                                             chain_offset,
                                             stream_id,
                                             half_sweep,
                                             batch,
                                             units,
                                             pointer<float>(states),
                                             pointer<float>(probabilities)};
  return rbm::cuda::sample_bernoulli(arguments, device, pointer<void>(stream));
}

py::tuple device_count() {
  std::string error;
  const int count = rbm::cuda::device_count(error);
  return py::make_tuple(count, error);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.def("device_count", &device_count,
        "How many CUDA devices there are, and the driver's words where there is none.");
  m.def("error_string", &rbm::cuda::error_string, py::arg("status"));
  m.def("sample_bernoulli", &sample_bernoulli, py::arg("x"), py::arg("bias"), py::arg("beta"),
        py::arg("seed"), py::arg("chain_offset"), py::arg("stream_id"), py::arg("half_sweep"),
        py::arg("batch"), py::arg("units"), py::arg("states"), py::arg("probabilities"),
        py::arg("device"), py::arg("stream"),
        "Launches the kernel; 0, or a status for error_string. probabilities may be 0.");
}
