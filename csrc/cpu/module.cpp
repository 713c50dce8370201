// Python's view of the cpu backend: addresses, sizes and strides in, a status out. No torch here.
#include "binding.h"
#include "cpu/operations.h"

namespace py = pybind11;
using namespace rbm::cpu;
using rbm::Address;
using rbm::at;
using rbm::Fields;

namespace {

const Kernels* g_kernels = widest_kernels();

// The elements of an array, by number; rbm_kernels/backends/cpu.py has the same.
constexpr int64_t kFloat32 = 0, kByte = 3;

// An array as rbm_kernels/backends/_native.py describes it.
struct Array {
  Address data;
  int64_t element, rows, cols, row_stride, col_stride, binary;

  explicit Array(const py::tuple& tuple) {
    Fields fields(tuple, 7);
    data = reinterpret_cast<Address>(fields.pointer<void>());
    for (int64_t* member : {&element, &rows, &cols, &row_stride, &col_stride, &binary})
      *member = fields.integer();
  }

  Input states() const {
    return {element == kFloat32 ? at<const float>(data) : nullptr,
            element == kByte ? at<const uint8_t>(data) : nullptr, rows, cols, row_stride};
  }
  Matrix matrix() const { return {at<const float>(data), rows, cols, row_stride, col_stride}; }
};

Output output(Address data, int64_t element) {
  return {element == kFloat32 ? at<float>(data) : nullptr,
          element == kByte ? at<uint8_t>(data) : nullptr};
}

struct Model {
  Matrix W;
  const float *b, *c, *log_var;

  explicit Model(const py::tuple& tuple) {
    Fields fields(tuple, 4);
    W = Array(fields.tuple()).matrix();
    b = fields.pointer<const float>();
    c = fields.pointer<const float>();
    log_var = fields.pointer<const float>();
  }
};

struct Layer {
  Matrix weight;
  const float *bias, *given_log_var, *drawn_log_var;

  explicit Layer(const py::tuple& tuple) {
    Fields fields(tuple, 4);
    weight = Array(fields.tuple()).matrix();
    bias = fields.pointer<const float>();
    given_log_var = fields.pointer<const float>();
    drawn_log_var = fields.pointer<const float>();
  }
};

struct Draw {
  Call call;
  float beta;
  const float* betas;

  Draw(const py::tuple& tuple, int threads) {
    Fields fields(tuple, 5);
    call.kernels = g_kernels;
    call.seed = fields.pointer<const int64_t>();
    call.chain_offset = static_cast<uint32_t>(fields.integer());
    beta = fields.number();
    betas = fields.pointer<const float>();
    call.digits = static_cast<int>(fields.integer());
    call.threads = threads;
  }

  Temperature temperature() const { return betas ? Temperature{betas, 1} : Temperature{&beta, 0}; }
};

int py_sample(const py::tuple& given, const py::tuple& layer, const py::tuple& draw, Address states,
              int64_t states_element, Address means, Address sums, int threads) {
  const Array g(given);
  const Layer l(layer);
  const Draw d(draw, threads);
  const py::gil_scoped_release release;
  return sample(g.states(), l.weight, l.bias, l.given_log_var, l.drawn_log_var, d.temperature(),
                output(states, states_element), at<float>(means), at<double>(sums), d.call);
}

int py_gibbs_sample(const py::tuple& v, const py::tuple& model, int64_t k, const py::tuple& draw,
                    Address mask, int64_t mask_stride, const py::tuple& values, Address states,
                    int64_t states_element, int threads) {
  const Array start(v), held(values);
  const Model m(model);
  const Draw d(draw, threads);
  const Clamp clamp{at<const uint8_t>(mask), mask_stride, held.states()};
  const py::gil_scoped_release release;
  return gibbs_sample(start.states(), m.W, m.b, m.c, k, m.log_var, d.temperature(), clamp,
                      output(states, states_element), d.call);
}

int py_free_energy(const py::tuple& v, const py::tuple& model, const py::tuple& draw,
                   Address energies, int threads) {
  const Array states(v);
  const Model m(model);
  const Draw d(draw, threads);
  const py::gil_scoped_release release;
  return free_energy(states.states(), m.W, m.b, m.c, m.log_var, d.temperature(),
                     at<float>(energies), d.call);
}

int py_cd_step(const py::tuple& v, const py::tuple& model, int64_t k, const py::tuple& chains,
               const py::tuple& draw, Address grad_W, int64_t grad_W_stride, Address grad_b,
               Address grad_c, bool accumulate, Address advanced, int64_t advanced_element,
               Address energies, int threads) {
  const Array data(v), start(chains);
  const Model m(model);
  const Draw d(draw, threads);
  const Input persistent = start.states();
  const CdOutput out{at<float>(grad_W),  grad_W_stride, at<float>(grad_b),
                     at<float>(grad_c),  accumulate,    output(advanced, advanced_element),
                     at<float>(energies)};
  const py::gil_scoped_release release;
  return cd_step(data.states(), m.W, m.b, m.c, k, start.data ? &persistent : nullptr, m.log_var,
                 out, d.call);
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
  m.def("threads_started", [] { return threads_started.load(); });
}
