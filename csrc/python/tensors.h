// What a call looks up in torch's tensors and modules, in C.
//
// Every call looks at all of a network's parameters: what they are, where they lie, whether a layer is
// more than its weights. In Python that takes longer than a small network does. torch isn't needed to
// build this: it hands out what a tensor is through DLPack's exchange functions, an interface of plain C
// (https://dmlc.github.io/dlpack), which torch has from 2.10 on. Older ones are asked in Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"

namespace diffcore {

namespace py = pybind11;

// ---- DLPack 1: the part of its interface that is used -------------------------------------------

namespace dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
constexpr int32_t cpu = 1;
constexpr uint8_t floating = 2, bfloat = 4;  // codes of types

struct ExchangeApi {
  uint32_t major, minor;
  void* older;
  void *allocate, *managed_from_object, *managed_to_object;
  // 0, or -1 and a Python exception. What it says holds until Python runs again.
  int (*from_object)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace dlpack

// ---- tensors ---------------------------------------------------------------------------------------

// A name that is looked up again and again.
inline PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// torch's, which Python names at import.
struct Torch {
  PyTypeObject *tensor, *parameter, *linear;
  PyObject *float32, *is_neg;
  PyObject* global_hooks;          // a tuple of dictionaries
  const dlpack::ExchangeApi* api;  // null: torch has none
};
inline Torch torch_types{};

// `global_hooks`: torch's dictionaries of hooks that every module's call meets. `exchange_api`:
// torch.Tensor.__dlpack_c_exchange_api__, or None.
inline void use_torch(py::type tensor, py::type parameter, py::type linear, py::object float32,
                      py::tuple global_hooks, py::object exchange_api) {
  torch_types.is_neg = py::object(tensor.attr("is_neg")).release().ptr();
  torch_types.tensor = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
  torch_types.parameter = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
  torch_types.linear = reinterpret_cast<PyTypeObject*>(linear.release().ptr());
  torch_types.float32 = float32.release().ptr();
  torch_types.global_hooks = global_hooks.release().ptr();
  torch_types.api = nullptr;
  if (!PyCapsule_IsValid(exchange_api.ptr(), "dlpack_exchange_api")) return;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
  if (api->major == 1 && api->from_object) torch_types.api = api;
}

struct TensorLook {
  const void* data;
  bool on_cpu, floating, float32, contiguous;
  int dimensions;
  int64_t rows, columns;  // the first two sizes
  int64_t last;           // size
  int64_t count;          // of values
  int64_t kind;           // the same for the same type and device; below 0: unknown
  int64_t bytes;          // from the first value to behind the last
};

inline bool is_contiguous(const dlpack::Tensor& t) {
  int64_t stride = 1;
  bool in_order = true;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] != 1 && t.strides[d] != stride) in_order = false;
    stride *= t.shape[d];
  }
  return in_order;
}

// From the first value of a tensor to behind the last.
template <class Sizes, class Strides>
int64_t extent(int dimensions, const Sizes& size, const Strides& stride) {
  int64_t last = 0;
  for (int d = 0; d < dimensions; ++d) {
    if (size(d) == 0) return 0;
    last += (size(d) - 1) * stride(d);
  }
  return last + 1;
}

inline bool look_in_python(py::handle tensor, TensorLook* out) {
  if (tensor.attr("is_meta").cast<bool>()) return false;
  const py::tuple shape = tensor.attr("shape"), strides = tensor.attr("stride")();
  out->data = reinterpret_cast<const void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  out->on_cpu = tensor.attr("is_cpu").cast<bool>();
  out->floating = tensor.attr("is_floating_point")().cast<bool>();
  out->float32 = tensor.attr("dtype").ptr() == torch_types.float32;
  out->contiguous = tensor.attr("is_contiguous")().cast<bool>();
  out->dimensions = static_cast<int>(shape.size());
  out->count = tensor.attr("numel")().cast<int64_t>();
  out->rows = shape.size() > 0 ? shape[0].cast<int64_t>() : 1;
  out->columns = shape.size() > 1 ? shape[1].cast<int64_t>() : 1;
  out->last = shape.size() > 0 ? shape[shape.size() - 1].cast<int64_t>() : 1;
  out->kind = out->on_cpu && out->float32 ? 0 : -1;
  out->bytes = tensor.attr("element_size")().cast<int64_t>() *
               extent(
                   out->dimensions, [&](int d) { return shape[d].cast<int64_t>(); },
                   [&](int d) { return strides[d].cast<int64_t>(); });
  return true;
}

// Whether its values lie in memory: those of torch.func's wrappers don't, nor do a tensor of zeros that
// torch keeps without any or one whose storage was freed.
// A view into such a storage lies as far from null as it did from the storage's begin; systems map nothing
// so low.
inline bool has_memory(const TensorLook& look) {
  constexpr uintptr_t lowest_address = 64 * 1024;
  return reinterpret_cast<uintptr_t>(look.data) >= lowest_address || look.count == 0;
}

// False for what isn't a tensor with memory.
inline bool look_at(py::handle tensor, TensorLook* out) {
  if (!PyObject_TypeCheck(tensor.ptr(), torch_types.tensor)) return false;
  if (!torch_types.api) {
    try {
      return look_in_python(tensor, out) && has_memory(*out);
    } catch (const std::exception&) {  // Python's, or an answer of another type
      return false;
    }
  }
  dlpack::Tensor t;
  if (torch_types.api->from_object(tensor.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  out->data = static_cast<const char*>(t.data) + t.byte_offset;
  out->on_cpu = t.device_type == dlpack::cpu;
  out->floating = t.type_code == dlpack::floating || t.type_code == dlpack::bfloat;
  out->float32 = t.type_code == dlpack::floating && t.type_bits == 32 && t.type_lanes == 1;
  out->contiguous = is_contiguous(t);
  out->dimensions = t.ndim;
  out->count = 1;
  for (int d = 0; d < t.ndim; ++d) out->count *= t.shape[d];
  out->rows = t.ndim > 0 ? t.shape[0] : 1;
  out->columns = t.ndim > 1 ? t.shape[1] : 1;
  out->last = t.ndim > 0 ? t.shape[t.ndim - 1] : 1;
  out->kind =
      (int64_t{t.device_type} << 32 | int64_t{t.device_id} << 16 | t.type_code << 8 | t.type_bits);
  out->bytes =
      t.type_bits * t.type_lanes / 8 *
      extent(t.ndim, [&](int d) { return t.shape[d]; }, [&](int d) { return t.strides[d]; });
  return has_memory(*out);
}

inline bool is_tensor(PyObject* object) {
  return Py_TYPE(object) == torch_types.tensor || Py_TYPE(object) == torch_types.parameter;
}

// Whether a tensor on the CPU that has values has no memory for them. Fake ones, a subclass, never had any.
inline bool lacks_memory(py::handle tensor) {
  TensorLook look{};
  if (!is_tensor(tensor.ptr())) return false;
  look_at(tensor, &look);
  return look.on_cpu && !has_memory(look);
}

// For a binding's argument. If its caster only said no, pybind11 would print the tensor, and torch crash.
inline void refuse_without_memory(py::handle tensor) {
  if (lacks_memory(tensor)) throw py::type_error("a tensor's memory was freed");
}

// Whether a tensor's values are what lies in its memory, negated.
inline bool is_negated(PyObject* tensor) {
  const auto answer =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch_types.is_neg, tensor));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// Whether an argument's memory holds its values: no subclass, no wrapper, nothing negated.
inline bool is_plain(PyObject* argument) {
  if (argument == Py_None) return true;
  PyTypeObject* const type = Py_TYPE(argument);
  if (type == torch_types.tensor || type == torch_types.parameter) {
    TensorLook look;
    return look_at(argument, &look) && !is_negated(argument);
  }
  return type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type ||
         type == &PyUnicode_Type;
}

// The same of a call's: tensors, numbers, texts and lists of them.
inline bool are_plain(const py::tuple& arguments) {
  for (py::handle argument : arguments) {
    if (!PyList_CheckExact(argument.ptr())) {
      if (!is_plain(argument.ptr())) return false;
      continue;
    }
    for (py::handle item : py::reinterpret_borrow<py::list>(argument))
      if (!is_plain(item.ptr())) return false;
  }
  return true;
}

// Whether it is a floating-point tensor of this shape, of up to two sizes; a text stands for any size.
// False means no more than that it takes a closer look.
inline bool fits(py::handle value, const py::tuple& shape) {
  TensorLook look;
  const auto dimensions = static_cast<int>(shape.size());
  if (!is_tensor(value.ptr()) || !look_at(value, &look) || !look.floating ||
      look.dimensions != dimensions || dimensions > 2)
    return false;
  const auto as_wanted = [&](int d, int64_t size) {
    PyObject* const wanted = PyTuple_GET_ITEM(shape.ptr(), d);
    if (PyUnicode_Check(wanted)) return true;
    const long long number = PyLong_AsLongLong(wanted);
    if (number == -1 && PyErr_Occurred()) PyErr_Clear();
    return number == size;
  };
  return (dimensions < 1 || as_wanted(0, look.rows)) &&
         (dimensions < 2 || as_wanted(1, look.columns));
}

// Whether kernels on the CPU can read it.
inline bool look_at_float32_on_cpu(py::handle tensor, TensorLook* look) {
  return is_tensor(tensor.ptr()) && look_at(tensor, look) && look->on_cpu && look->float32;
}

inline bool are_float32_on_cpu(py::handle tensors, bool contiguous) {
  if (!PyList_CheckExact(tensors.ptr())) return false;
  for (py::handle tensor : tensors) {
    TensorLook look;
    if (!look_at_float32_on_cpu(tensor, &look) || (contiguous && !look.contiguous)) return false;
  }
  return true;
}

// The same, and that nothing but their memory says what their values are.
inline bool are_plain_float32_on_cpu(const py::list& tensors) {
  for (py::handle tensor : tensors) {
    TensorLook look;
    if (!look_at_float32_on_cpu(tensor, &look) || is_negated(tensor.ptr())) return false;
  }
  return true;
}

// Which of these tensors shares memory with one that a call changes: its index; behind the last where two
// of those that change do; else none. What lies between a tensor's values counts as its memory.
inline std::optional<size_t> sharing(const py::list& read, const py::list& changed) {
  using Span = std::pair<const char*, const char*>;
  const auto span_of = [](py::handle tensor) {
    TensorLook look{};
    if (!look_at(tensor, &look) || !look.bytes) return Span{};
    const auto* begin = static_cast<const char*>(look.data);
    return Span{begin, begin + look.bytes};
  };
  std::vector<Span> spans;
  for (py::handle tensor : changed) spans.push_back(span_of(tensor));
  for (size_t i = 0; i < read.size(); ++i) {
    const auto [begin, end] = span_of(read[i]);
    for (const auto& [other_begin, other_end] : spans)
      if (begin < other_end && other_begin < end) return i;
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    if (spans[i].first < spans[i - 1].second) return read.size();
  return std::nullopt;
}

// ---- layers ----------------------------------------------------------------------------------------

inline bool are_lists_as_long(py::handle one, py::handle other) {
  return PyList_CheckExact(one.ptr()) && PyList_CheckExact(other.ptr()) &&
         PyList_GET_SIZE(one.ptr()) == PyList_GET_SIZE(other.ptr());
}

inline py::handle item(py::handle list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); }

// Whether weights [out, in] and biases [out], all float32 on the CPU, lead from so many inputs on from one
// layer to the next. Like what follows it says no to more than what is wrong.
inline bool layers_fit(py::handle weights, py::handle biases, int64_t width) {
  if (!are_lists_as_long(weights, biases)) return false;
  for (Py_ssize_t l = 0; l < PyList_GET_SIZE(weights.ptr()); ++l) {
    TensorLook weight, bias;
    if (!look_at_float32_on_cpu(item(weights, l), &weight) ||
        !look_at_float32_on_cpu(item(biases, l), &bias) || weight.dimensions != 2 ||
        bias.dimensions != 1 || weight.columns != width || bias.rows != weight.rows)
      return false;
    width = weight.rows;
  }
  return true;
}

// Whether two lists of vectors and matrices, all float32 on the CPU, have the same sizes.
inline bool same_sizes(py::handle tensors, py::handle others) {
  if (!are_lists_as_long(tensors, others)) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    TensorLook one, other;
    if (!look_at_float32_on_cpu(item(tensors, i), &one) ||
        !look_at_float32_on_cpu(item(others, i), &other) || one.dimensions != other.dimensions ||
        one.dimensions > 2 || one.rows != other.rows || one.columns != other.columns)
      return false;
  }
  return true;
}

// Whether there are hooks that a call of any module meets.
inline bool has_global_hooks() {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(torch_types.global_hooks); ++i)
    if (PyDict_Size(PyTuple_GET_ITEM(torch_types.global_hooks, i)) > 0) return true;
  return false;
}

// Whether a module is exactly of a class, without hooks or a forward of its own.
inline bool is_unaltered(PyObject* module, PyTypeObject* type) {
  static PyObject* const names[] = {interned("_forward_hooks"), interned("_forward_pre_hooks"),
                                    interned("_backward_hooks"), interned("_backward_pre_hooks")};
  static PyObject* const forward = interned("forward");
  if (Py_TYPE(module) != type) return false;
  const auto attributes =
      py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!attributes) throw py::error_already_set();
  if (PyDict_GetItemWithError(attributes.ptr(), forward)) return false;
  for (PyObject* name : names) {
    PyObject* const hooks = PyDict_GetItemWithError(attributes.ptr(), name);
    if (!hooks || !PyDict_Check(hooks) || PyDict_Size(hooks) > 0) return false;
  }
  return true;
}

// [weight, bias, weight, bias, ...] of a dictionary of so many torch.nn.Linear with these inputs and
// outputs, or None where there is anything about them that takes a closer look: another class,
// hooks, a missing bias, shapes that don't fit; if only plain ones are wanted, whatever isn't float32 on
// the CPU and there in memory.
inline py::object linear_stack(const py::dict& modules, size_t count, std::optional<int64_t> in,
                               std::optional<int64_t> out, bool plain) {
  static PyObject* const own = interned("_parameters");
  static PyObject* const names[] = {interned("weight"), interned("bias")};
  if (modules.size() != count) return py::none();
  py::list result(2 * count);
  size_t filled = 0;
  std::optional<int64_t> width = in;
  for (const auto& item : modules) {
    PyObject* const layer = item.second.ptr();
    if (!is_unaltered(layer, torch_types.linear)) return py::none();
    const auto attributes =
        py::reinterpret_steal<py::object>(PyObject_GenericGetDict(layer, nullptr));
    PyObject* const parameters = PyDict_GetItemWithError(attributes.ptr(), own);
    if (!parameters || !PyDict_Check(parameters)) return py::none();
    PyObject* const weight = PyDict_GetItemWithError(parameters, names[0]);
    PyObject* const bias = PyDict_GetItemWithError(parameters, names[1]);
    TensorLook w, b;
    if (!weight || !bias || !is_tensor(weight) || !is_tensor(bias) || !look_at(weight, &w) ||
        !look_at(bias, &b) || w.dimensions != 2 || b.dimensions != 1 || b.rows != w.rows ||
        (width && w.columns != *width))
      return py::none();
    if (plain && !(w.on_cpu && w.float32 && b.on_cpu && b.float32 && !is_negated(weight) &&
                   !is_negated(bias)))
      return py::none();
    width = w.rows;
    result[filled++] = py::handle(weight);
    result[filled++] = py::handle(bias);
  }
  if (out && width != out) return py::none();
  return std::move(result);
}

// What an object itself has of a name, or null.
inline PyObject* own(PyObject* object, PyObject* name) {
  if (!object) return nullptr;
  const auto attributes =
      py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  PyObject* const found = attributes ? PyDict_GetItemWithError(attributes.ptr(), name) : nullptr;
  if (!found) PyErr_Clear();
  return found;
}

// The first layer's weight of a diffcore.nn.MLP, or null where it isn't found in its place.
inline PyObject* first_weight(PyObject* mlp) {
  static PyObject* const modules = interned("_modules");
  static PyObject* const names[] = {interned("layers"), interned("_parameters"),
                                    interned("weight")};
  PyObject* const parts = own(mlp, modules);
  if (!parts || !PyDict_Check(parts)) return nullptr;
  PyObject* const layers = own(PyDict_GetItem(parts, names[0]), modules);
  PyObject* first;
  Py_ssize_t position = 0;
  if (!layers || !PyDict_Check(layers) || !PyDict_Next(layers, &position, nullptr, &first))
    return nullptr;
  PyObject* const parameters = own(first, names[1]);
  return parameters && PyDict_Check(parameters) ? PyDict_GetItem(parameters, names[2]) : nullptr;
}

// Whether tensors with rows of these widths, as many in each, have the type and device of a
// diffcore.nn.MLP's weights. A tensor that is alone may have any leading dimensions.
inline bool inputs_fit(const py::list& tensors, const py::tuple& widths, py::handle mlp) {
  PyObject* const weight = first_weight(mlp.ptr());
  TensorLook like, first{}, look;
  if (!weight || !is_tensor(weight) || !look_at(weight, &like) || !like.floating || like.kind < 0)
    return false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!is_tensor(item(tensors, i).ptr()) || !look_at(item(tensors, i), &look) ||
        look.kind != like.kind || look.dimensions < 1 || look.last != widths[i].cast<int64_t>())
      return false;
    if (tensors.size() > 1 && look.dimensions != 2) return false;
    if (i == 0) first = look;
    if (look.rows != first.rows) return false;
  }
  return true;
}

// linear_stack of a diffcore.nn.MLP, whose class is `type`; None as well where that does more than its
// layers, by a hook for instance.
inline py::object mlp_stack(py::handle mlp, py::type type, std::optional<int64_t> in,
                            std::optional<int64_t> out, bool plain) {
  static PyObject* const modules = interned("_modules");
  static PyObject* const layers = interned("layers");
  static PyObject* const activations = interned("activations");
  if (!is_unaltered(mlp.ptr(), reinterpret_cast<PyTypeObject*>(type.ptr()))) return py::none();
  const py::object list = mlp.attr(modules)[layers];
  return linear_stack(list.attr(modules), py::len(mlp.attr(activations)), in, out, plain);
}

// Whether all of a network's hidden layers have this activation, and its last one none.
inline bool has_activation(py::handle mlp, py::handle activation) {
  static PyObject* const activations = interned("activations");
  static PyObject* const identity = interned("identity");
  const py::object list = mlp.attr(activations);
  if (!PyList_CheckExact(list.ptr()) || !PyUnicode_Check(activation.ptr())) return false;
  const Py_ssize_t count = PyList_GET_SIZE(list.ptr());
  for (Py_ssize_t l = 0; l < count; ++l) {
    PyObject* const wanted = l + 1 < count ? activation.ptr() : identity;
    if (PyObject_RichCompareBool(item(list, l).ptr(), wanted, Py_EQ) != 1) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

// mlp_stack of each of some MLPs that a module of class `type` has: their names, inputs and outputs. None
// as well where that module does more, an MLP has other activations than this, or a call of them would meet
// global hooks.
inline py::object mlp_stacks(py::handle module, py::type type, const py::tuple& networks,
                             py::type mlp_type, py::handle activation, bool plain) {
  static PyObject* const modules = interned("_modules");
  if (has_global_hooks() ||
      !is_unaltered(module.ptr(), reinterpret_cast<PyTypeObject*>(type.ptr())))
    return py::none();
  const py::object own = module.attr(modules);
  py::list result(networks.size());
  for (size_t i = 0; i < networks.size(); ++i) {
    const py::tuple network = networks[i];
    const py::object mlp = own[network[0]];
    const py::object stack =
        mlp_stack(mlp, mlp_type, network[1].cast<int64_t>(), network[2].cast<int64_t>(), plain);
    if (stack.is_none() || !has_activation(mlp, activation)) return py::none();
    result[i] = stack;
  }
  return std::move(result);
}

// ---- whole calls -----------------------------------------------------------------------------------

// What a list or a tuple holds, alive as long as this is; none of anything else.
inline std::optional<py::tuple> items_of(py::handle sequence) {
  if (!PyList_CheckExact(sequence.ptr()) && !PyTuple_CheckExact(sequence.ptr())) return {};
  return py::reinterpret_steal<py::tuple>(PySequence_Tuple(sequence.ptr()));
}

inline py::handle nth(const py::tuple& tuple, size_t n) {
  return PyTuple_GET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(n));
}

inline bool requires_grad(py::handle tensor) {
  static PyObject* const name = interned("requires_grad");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
  if (!answer) throw py::error_already_set();
  return answer.ptr() == Py_True;
}

// A tensor of this shape like another; its values' address goes to `values`.
inline py::object empty_like(py::handle tensor, const py::tuple& shape, uintptr_t* values) {
  static PyObject* const new_empty = interned("new_empty");
  auto result = py::reinterpret_steal<py::object>(
      PyObject_CallMethodOneArg(tensor.ptr(), new_empty, shape.ptr()));
  if (!result) throw py::error_already_set();
  TensorLook look;
  if (!look_at(result, &look)) throw py::type_error("new_empty made no tensor with memory");
  *values = reinterpret_cast<uintptr_t>(look.data);
  return result;
}

// Which of some names a text is, or none.
template <class Value, size_t count>
std::optional<Value> named(py::handle text, const std::pair<const char*, Value> (&names)[count]) {
  if (!PyUnicode_Check(text.ptr())) return std::nullopt;
  for (const auto& [name, value] : names)
    if (PyUnicode_CompareWithASCIIString(text.ptr(), name) == 0) return value;
  return std::nullopt;
}

// A contiguous float32 tensor on the CPU.
struct Floats {
  float* values;
  int64_t count;
};

// A network's layers. Python gives them as [weight, bias, weight, bias, ...].
struct Layers : std::vector<Layer> {
  std::vector<py::object> copies;  // of what didn't lie row by row, for the time of a call
};

}  // namespace diffcore

namespace pybind11::detail {

template <>
struct type_caster<diffcore::Floats> {
  PYBIND11_TYPE_CASTER(diffcore::Floats, const_name("Tensor"));

  bool load(handle source, bool) {
    diffcore::TensorLook look;
    if (!diffcore::look_at_float32_on_cpu(source, &look) || !look.contiguous) {
      diffcore::refuse_without_memory(source);
      return false;
    }
    value = {static_cast<float*>(const_cast<void*>(look.data)), look.count};
    return true;
  }
};

template <>
struct type_caster<diffcore::Layers> {
  PYBIND11_TYPE_CASTER(diffcore::Layers, const_name("list[Tensor]"));

  bool load(handle source, bool) {
    if (!PyList_Check(source.ptr())) return false;
    const auto parameters = reinterpret_borrow<list>(source);
    if (parameters.size() % 2) return false;
    value.reserve(parameters.size() / 2);
    for (size_t i = 0; i < parameters.size(); i += 2) {
      diffcore::TensorLook weight, bias;
      if (!rows_of(parameters[i], &weight) || !rows_of(parameters[i + 1], &bias)) return false;
      value.emplace_back(reinterpret_cast<uintptr_t>(weight.data),
                         reinterpret_cast<uintptr_t>(bias.data), static_cast<int>(weight.columns),
                         static_cast<int>(weight.rows));
    }
    return true;
  }

 private:
  bool rows_of(object tensor, diffcore::TensorLook* look) {
    if (!diffcore::look_at(tensor, look)) {
      diffcore::refuse_without_memory(tensor);
      return false;
    }
    if (look->contiguous) return true;
    value.copies.push_back(tensor.attr("contiguous")());
    return diffcore::look_at(value.copies.back(), look);
  }
};

}  // namespace pybind11::detail
