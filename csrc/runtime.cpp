// The plan as a Python module: NumPy in, NumPy out. Links no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "plan/plan.h"
#include "plan/thread_pool.h"

namespace py = pybind11;
using fastgen::plan::Plan;

namespace {

py::tuple shape(const fastgen::plan::End& end) {
  if (end.rank == 0) return py::make_tuple();
  if (end.rank == 1) return py::make_tuple(end.shape.elements());
  return py::make_tuple(end.shape.c, end.shape.h, end.shape.w);
}

// Pairs of an image's shape and, for labels, their number.
py::list ends(const std::vector<fastgen::plan::End>& ends) {
  py::list result;
  for (const auto& end : ends) result.append(py::make_tuple(shape(end), end.label_count));
  return result;
}

// fastgen.runtime has already checked the arrays.
void run(const Plan& plan, int64_t n, const std::vector<uintptr_t>& in, const std::vector<uintptr_t>& out) {
  const py::gil_scoped_release release;
  std::vector<const void*> from;
  std::vector<float*> to;
  for (const uintptr_t address : in) from.push_back(reinterpret_cast<const void*>(address));
  for (const uintptr_t address : out) to.push_back(reinterpret_cast<float*>(address));
  if (from.size() != plan.inputs().size() || to.size() != plan.outputs().size())
    throw std::invalid_argument("run needs one address per input and output");
  plan.run(n, from, to);
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
      .def_static("load", [](const std::string& path,
                             int threads) { return std::make_unique<Plan>(fastgen::plan::File::read(path), threads); })
      .def("file", [](const Plan& plan) { return py::bytes(plan.file()); })
      .def("run", run)
      .def("tune", &Plan::tune, py::arg("n"), py::arg("split"), py::call_guard<py::gil_scoped_release>())
      .def("profile", &Plan::profile, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("inputs", [](const Plan& plan) { return ends(plan.inputs()); })
      .def_property_readonly("outputs", [](const Plan& plan) { return ends(plan.outputs()); })
      .def_property_readonly("precision", [](const Plan& plan) { return name(plan.header().precision); })
      .def_property_readonly("runs_as", [](const Plan& plan) { return name(plan.runs_as()); })
      .def_property(
          "error", [](const Plan& plan) { return plan.header().error; }, &Plan::set_error)
      .def_property_readonly("images_at_once", &Plan::images_at_once)
      .def_property_readonly("batches_to_tune", &Plan::batches_to_tune)
      .def_property_readonly("threads", &Plan::threads);
}
