// What the modules for CPU and GPU have in common.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <cstdint>
#include <tuple>
#include <utility>

namespace diffcore {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Python's lock isn't held while one of these lives.
//
// A daemon thread that wants it back when the interpreter has ended is ended as well, up to Python 3.13 by
// pthread_exit, which unwinds it as an exception would; the first function that throws nothing, such as a
// destructor, then aborts the process. So it is stopped here, and sleeps until the process is gone, as it
// does in Python 3.14.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {  // to leave it, even by an exception of its own, is to go on with the end
      for (;;) pause();
    }
  }

 private:
  PyThreadState* thread_;
};

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
