// Python's view of the cuda backend: addresses, sizes and strides in, a status out. Tensors cross
// as addresses and the stream as an integer, so that one build serves every version of torch. The
// emulated build (RBM_EMULATED) is the same module for a CPU.
#include "binding.h"
#include "cuda/ops/operations.h"

namespace py = pybind11;
using namespace rbm::cuda;
using rbm::Address;
using rbm::at;
using rbm::Fields;

namespace {

// An array as rbm_kernels/backends/_native.py describes it.
Matrix matrix(const py::tuple& tuple) {
  Fields fields(tuple, 7);
  Matrix m;
  m.data = fields.pointer<const void>();
  m.element = static_cast<Element>(fields.integer());
  for (int64_t* member : {&m.rows, &m.cols, &m.row_stride, &m.col_stride})
    *member = fields.integer();
  m.binary = fields.integer() != 0;
  return m;
}

struct Model {
  Matrix W;
  const float *b, *c, *log_var;

  explicit Model(const py::tuple& tuple) {
    Fields fields(tuple, 4);
    W = matrix(fields.tuple());
    b = fields.pointer<const float>();
    c = fields.pointer<const float>();
    log_var = fields.pointer<const float>();
  }
};

// How states are drawn, and where: `context` tells of the device, its stream and its memory.
struct CallContext {
  Call call{};
  Temperature temperature;
  PyObject* allocate;  // gives a tensor of that many bytes

  CallContext(const py::tuple& draw, const py::tuple& context) {
    Fields drawn(draw, 5), where(context, 3);
    call.seed = drawn.pointer<const int64_t>();
    call.chain_offset = static_cast<uint32_t>(drawn.integer());
    temperature.beta = drawn.number();
    temperature.betas = drawn.pointer<const float>();
    call.digits = static_cast<int>(drawn.integer());
    allocate = where.object();
    call.device = static_cast<int>(where.integer());
    call.stream = where.pointer<void>();
  }
};

// Runs an operation twice: to learn how much memory it needs, and, with that memory, to launch it.
template <class Operation> int launch(int (*operation)(const Operation&, Call&), const Operation& a,
                                      const CallContext& context) {
  Call call = context.call;
  const int status = operation(a, call);
  if (status) return status;
  const py::object workspace = py::handle(context.allocate)(call.workspace_bytes);
  call.workspace = at<void>(workspace.attr("data_ptr")().cast<Address>());
  const py::gil_scoped_release release;
  return operation(a, call);
}

int py_sample(const py::tuple& given, const py::tuple& layer, const py::tuple& draw, Address states,
              int states_element, Address means, const py::tuple& where) {
  const CallContext context(draw, where);
  Fields fields(layer, 4);
  Sample a;
  a.given = matrix(given);
  a.weight = matrix(fields.tuple());
  a.bias = fields.pointer<const float>();
  a.given_log_var = fields.pointer<const float>();
  a.drawn_log_var = fields.pointer<const float>();
  a.temperature = context.temperature;
  a.states = at<void>(states);
  a.states_element = static_cast<Element>(states_element);
  a.means = at<float>(means);
  return launch(sample, a, context);
}

int py_gibbs_sample(const py::tuple& v, const py::tuple& model, int64_t k, const py::tuple& draw,
                    Address mask, int64_t mask_stride, const py::tuple& values, Address states,
                    int states_element, const py::tuple& where) {
  const CallContext context(draw, where);
  const Model m(model);
  const Gibbs a{matrix(v),
                m.W,
                m.b,
                m.c,
                k,
                m.log_var,
                context.temperature,
                at<const uint8_t>(mask),
                mask_stride,
                matrix(values),
                at<void>(states),
                static_cast<Element>(states_element)};
  return launch(gibbs_sample, a, context);
}

int py_free_energy(const py::tuple& v, const py::tuple& model, const py::tuple& draw,
                   Address energies, const py::tuple& where) {
  const CallContext context(draw, where);
  const Model m(model);
  const FreeEnergy a{matrix(v), m.W, m.b, m.c, m.log_var, context.temperature, at<float>(energies)};
  return launch(free_energy, a, context);
}

int py_cd_step(const py::tuple& v, const py::tuple& model, int64_t k, const py::tuple& chains,
               const py::tuple& draw, Address grad_W, int64_t grad_W_stride, Address grad_b,
               Address grad_c, bool accumulate, Address advanced, int advanced_element,
               Address energies, const py::tuple& where) {
  const CallContext context(draw, where);
  const Model m(model);
  const CdStep a{matrix(v),
                 m.W,
                 m.b,
                 m.c,
                 k,
                 matrix(chains),
                 m.log_var,
                 at<float>(grad_W),
                 grad_W_stride,
                 at<float>(grad_b),
                 at<float>(grad_c),
                 accumulate,
                 at<void>(advanced),
                 static_cast<Element>(advanced_element),
                 at<float>(energies)};
  return launch(cd_step, a, context);
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
  m.def("clusters_on_device", &clusters_on_device, py::arg("device"), py::arg("blocks"),
        py::arg("digits"), py::arg("gaussian"),
        "How many clusters of that many blocks a device runs at once.");
  m.def("device_count", &py_device_count,
        "How many CUDA devices there are, and the driver's words where there is none.");
  m.def("error_string", &error_string, py::arg("status"));
}
