// Python's view of the cpu backend: addresses, sizes and strides in, a status out. No torch here.
#include <pybind11/pybind11.h>

#include "cpu/operations.h"

namespace py = pybind11;
using namespace rbm::cpu;

namespace {

using Address = uintptr_t;
template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

const Kernels* g_kernels = widest_kernels();

Call call(Address seed, int64_t chain_offset, int digits, int threads) {
  return {g_kernels, at<const int64_t>(seed), static_cast<uint32_t>(chain_offset), digits, threads};
}

// `width` is 4 for float32, 1 for bytes.
Input input(Address data, int width, int64_t rows, int64_t units, int64_t stride) {
  return {width == 4 ? at<const float>(data) : nullptr,
          width == 4 ? nullptr : at<const uint8_t>(data), rows, units, stride};
}
Output output(Address data, int width) {
  return {width == 4 ? at<float>(data) : nullptr, width == 4 ? nullptr : at<uint8_t>(data)};
}

int py_sample(Address given, int given_width, int64_t rows, int64_t K, int64_t given_stride,
              Address weight, int64_t N, int64_t row_stride, int64_t col_stride, Address bias,
              Address given_log_var, Address drawn_log_var, Address beta, int64_t beta_stride,
              Address states, int states_width, Address means, Address sums, Address seed,
              int64_t chain_offset, int digits, int threads) {
  py::gil_scoped_release release;
  return sample(input(given, given_width, rows, K, given_stride),
                {at<const float>(weight), K, N, row_stride, col_stride}, at<const float>(bias),
                at<const float>(given_log_var), at<const float>(drawn_log_var),
                {at<const float>(beta), beta_stride}, output(states, states_width),
                at<float>(means), at<double>(sums), call(seed, chain_offset, digits, threads));
}

int py_gibbs_sample(Address v, int v_width, int64_t rows, int64_t v_stride, Address W, int64_t V,
                    int64_t H, int64_t row_stride, int64_t col_stride, Address b, Address c,
                    int64_t k, Address log_var, Address beta, int64_t beta_stride, Address mask,
                    int64_t mask_stride, Address values, int values_width, int64_t values_stride,
                    Address states, int states_width, Address seed, int64_t chain_offset,
                    int digits, int threads) {
  py::gil_scoped_release release;
  const Clamp clamp{at<const uint8_t>(mask), mask_stride,
                    input(values, values_width, rows, V, values_stride)};
  return gibbs_sample(input(v, v_width, rows, V, v_stride),
                      {at<const float>(W), V, H, row_stride, col_stride}, at<const float>(b),
                      at<const float>(c), k, at<const float>(log_var),
                      {at<const float>(beta), beta_stride}, clamp, output(states, states_width),
                      call(seed, chain_offset, digits, threads));
}

int py_free_energy(Address v, int v_width, int64_t rows, int64_t v_stride, Address W, int64_t V,
                   int64_t H, int64_t row_stride, int64_t col_stride, Address b, Address c,
                   Address log_var, Address beta, int64_t beta_stride, Address out, int digits,
                   int threads) {
  py::gil_scoped_release release;
  return free_energy(
      input(v, v_width, rows, V, v_stride), {at<const float>(W), V, H, row_stride, col_stride},
      at<const float>(b), at<const float>(c), at<const float>(log_var),
      {at<const float>(beta), beta_stride}, at<float>(out), call(0, 0, digits, threads));
}

int py_cd_step(Address v, int v_width, int64_t rows, int64_t v_stride, Address W, int64_t V,
               int64_t H, int64_t row_stride, int64_t col_stride, Address b, Address c, int64_t k,
               Address chains, int chains_width, int64_t n_chains, int64_t chains_stride,
               Address log_var, Address grad_W, int64_t grad_W_stride, Address grad_b,
               Address grad_c, bool accumulate, Address advanced, int advanced_width,
               Address energies, Address seed, int64_t chain_offset, int digits, int threads) {
  py::gil_scoped_release release;
  const Input persistent = input(chains, chains_width, n_chains, V, chains_stride);
  const CdOutput out{at<float>(grad_W),  grad_W_stride, at<float>(grad_b),
                     at<float>(grad_c),  accumulate,    output(advanced, advanced_width),
                     at<float>(energies)};
  return cd_step(input(v, v_width, rows, V, v_stride),
                 {at<const float>(W), V, H, row_stride, col_stride}, at<const float>(b),
                 at<const float>(c), k, chains ? &persistent : nullptr, at<const float>(log_var),
                 out, call(seed, chain_offset, digits, threads));
}

void use(const std::string& name) {
  const Kernels* named = name.empty() ? widest_kernels() : kernels_named(name.c_str());
  if (!named)
    throw py::value_error("instruction set '" + name +
                          "' was not built or does not run on this processor");
  g_kernels = named;
}

py::tuple philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
  uint32_t c[4] = {c0, c1, c2, c3};
  rbm::philox4x32(c, key0, key1);
  return py::make_tuple(c[0], c[1], c[2], c[3]);
}

py::list instruction_sets() {
  py::list names;
  for (const char* name : {"avx512", "avx2", "plain", "amx", "amx_emulated"}) {
    if (kernels_named(name)) names.append(name);
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The C++ kernels of rbm_kernels.backends.cpu, over raw addresses.";
  m.def("sample", &py_sample);
  m.def("gibbs_sample", &py_gibbs_sample);
  m.def("free_energy", &py_free_energy);
  m.def("cd_step", &py_cd_step);
  m.def("use", &use, "Use the instruction set of that name; the widest for ''.");
  m.def("in_use", [] { return g_kernels->name; });
  m.def("instruction_sets", &instruction_sets,
        "Names of those that were built and run here, the default first.");
  m.def("philox4x32", &philox);
}
