// What the modules for CPU and GPU have in common.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

namespace diffcore {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// (weight address, bias address, in, out)
using Layer = std::tuple<Address, Address, int, int>;

// Each module has enumerations of its own, but for what it multiplies in of the same names. They are local
// to it: several modules may be loaded side by side.
template <class Activation, class RffKind, class NormClip, class ActionOptimizer>
void define_enumerations(pybind11::module_& m) {
  namespace py = pybind11;
  py::enum_<Activation>(m, "Activation", py::module_local())
      .value("identity", Activation::identity)
      .value("relu", Activation::relu)
      .value("elu", Activation::elu)
      .value("silu", Activation::silu)
      .value("tanh", Activation::tanh)
      .value("mish", Activation::mish)
      .value("gelu", Activation::gelu)
      .value("sin", Activation::sin)
      .value("cos", Activation::cos);
  py::enum_<RffKind>(m, "RffKind", py::module_local())
      .value("sin", RffKind::sin)
      .value("cos", RffKind::cos)
      .value("cos_sin", RffKind::cos_sin);
  py::enum_<NormClip>(m, "NormClip", py::module_local())
      .value("none", NormClip::none)
      .value("batch", NormClip::batch)
      .value("row", NormClip::row);
  py::enum_<ActionOptimizer>(m, "ActionOptimizer", py::module_local())
      .value("adam", ActionOptimizer::adam)
      .value("ascent", ActionOptimizer::ascent);
}

}  // namespace diffcore
