// The plan as a Python module: NumPy in, NumPy out. Links no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan/plan.h"
#include "plan/pool.h"

namespace py = pybind11;
using fastgen::plan::Plan;

namespace {

py::tuple shape(int64_t rank, const int64_t* size) {
  if (rank == 1) return py::make_tuple(size[0]);
  return py::make_tuple(size[0], size[1], size[2]);
}

// fastgen.runtime has checked the arrays.
void run(const Plan& plan, int64_t n, uintptr_t in, uintptr_t out) {
  const py::gil_scoped_release release;
  plan.run(n, reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out));
}

}  // namespace

PYBIND11_MODULE(_runtime, m) {
  m.def("thread_count", fastgen::plan::thread_count);
  py::class_<Plan>(m, "Plan")
      .def(py::init([](const py::bytes& bytes, int threads) {
        const std::string_view view = bytes;
        fastgen::plan::File file{fastgen::cpu::scratch<char>(static_cast<int64_t>(view.size())), view.size()};
        std::copy(view.begin(), view.end(), file.bytes.get());
        return std::make_unique<Plan>(std::move(file), threads);
      }))
      .def_static("load", [](const std::string& path, int threads) { return std::make_unique<Plan>(fastgen::plan::File::read(path), threads); })
      .def("run", run)
      .def("tune", &Plan::tune, py::call_guard<py::gil_scoped_release>())
      .def("profile", &Plan::profile, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("input_shape", [](const Plan& plan) { return shape(plan.header().input_rank, plan.header().input); })
      .def_property_readonly("output_shape", [](const Plan& plan) { return shape(plan.header().output_rank, plan.header().output); })
      .def_property_readonly("precision", [](const Plan& plan) { return plan.header().bfloat16 ? "bf16" : "fp32"; })
      .def_property_readonly("images_at_once", &Plan::images_at_once)
      .def_property_readonly("threads", &Plan::threads);
}
