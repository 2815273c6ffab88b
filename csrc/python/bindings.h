// What the modules for CPU and GPU have in common.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <utility>

namespace diffcore {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// (weight address, bias address, in, out)
using Layer = std::tuple<Address, Address, int, int>;

// What values are called in Python.
template <class Activation>
constexpr std::pair<const char*, Activation> activation_names[] = {
    {"identity", Activation::identity}, {"relu", Activation::relu}, {"elu", Activation::elu},
    {"silu", Activation::silu},         {"tanh", Activation::tanh}, {"mish", Activation::mish},
    {"gelu", Activation::gelu},         {"sin", Activation::sin},   {"cos", Activation::cos}};
template <class RffKind>
constexpr std::pair<const char*, RffKind> rff_kind_names[] = {
    {"sin", RffKind::sin}, {"cos", RffKind::cos}, {"cos_sin", RffKind::cos_sin}};

// Each module has enumerations of its own, but for what it multiplies in of the same names. They are local
// to it: several modules may be loaded side by side.
template <class Activation, class RffKind, class NormClip, class ActionOptimizer>
void define_enumerations(pybind11::module_& m) {
  namespace py = pybind11;
  py::enum_<Activation> activations(m, "Activation", py::module_local());
  for (const auto& [name, value] : activation_names<Activation>) activations.value(name, value);
  py::enum_<RffKind> kinds(m, "RffKind", py::module_local());
  for (const auto& [name, value] : rff_kind_names<RffKind>) kinds.value(name, value);
  py::enum_<NormClip>(m, "NormClip", py::module_local())
      .value("none", NormClip::none)
      .value("batch", NormClip::batch)
      .value("row", NormClip::row);
  py::enum_<ActionOptimizer>(m, "ActionOptimizer", py::module_local())
      .value("adam", ActionOptimizer::adam)
      .value("ascent", ActionOptimizer::ascent);
}

}  // namespace diffcore
