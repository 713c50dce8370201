// What both module.cpp use to read Python's arguments. No other file of csrc/ knows Python.
//
// What belongs together crosses as a tuple and becomes a struct at once. A tuple of integers costs
// a few tenths of a microsecond; an object of pybind11's with named fields costs several.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

namespace rbm {

using Address = uintptr_t;

template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

// The fields of a tuple, one after the other in the order of a struct's members.
class Fields {
 public:
  Fields(const pybind11::tuple& tuple, Py_ssize_t size) : tuple_(tuple.ptr()) {
    if (PyTuple_GET_SIZE(tuple_) != size)
      throw pybind11::type_error("expected a tuple of " + std::to_string(size) + " fields, got " +
                                 std::to_string(PyTuple_GET_SIZE(tuple_)));
  }

  PyObject* object() { return PyTuple_GET_ITEM(tuple_, next_++); }

  pybind11::tuple tuple() {
    PyObject* field = object();
    if (!PyTuple_Check(field)) throw pybind11::type_error("expected a tuple as a field");
    return pybind11::reinterpret_borrow<pybind11::tuple>(field);
  }

  int64_t integer() {
    const long long value = PyLong_AsLongLong(object());
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return value;
  }

  template <class T> T* pointer() {
    const unsigned long long value = PyLong_AsUnsignedLongLong(object());
    if (value == static_cast<unsigned long long>(-1) && PyErr_Occurred())
      throw pybind11::error_already_set();
    return at<T>(static_cast<Address>(value));
  }

  float number() {
    const double value = PyFloat_AsDouble(object());
    if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return static_cast<float>(value);
  }

 private:
  PyObject* tuple_;
  Py_ssize_t next_ = 0;
};

}  // namespace rbm
