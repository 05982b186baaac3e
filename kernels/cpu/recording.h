// Calls of exported functions with arguments that were recorded before.
#pragma once

#include <type_traits>
#include <utility>

#include "vec.h"

// An argument in the form in which `recording.py` stores it.
union Argument {
  int64_t integer;
  double real;
  void* pointer;
};

template <class T>
inline T as(const Argument& argument) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(argument.pointer);
  } else if constexpr (std::is_floating_point_v<T>) {
    return argument.real;
  } else {
    return argument.integer;
  }
}

template <class... Types, size_t... I>
inline int64_t call_with(int64_t (*function)(Types...), const Argument* arguments, int64_t threads,
                         std::index_sequence<I...>) {
  const Argument last{threads};
  return function(as<Types>(I + 1 == sizeof...(I) ? last : arguments[I])...);
}

template <class... Types>
inline int64_t call_with(int64_t (*function)(Types...), const Argument* arguments, int64_t threads) {
  return call_with(function, arguments, threads, std::index_sequence_for<Types...>());
}

using RecordedFunction = int64_t (*)(const Argument* arguments, int64_t threads);

// Exports `name_recorded`, which takes the arguments of the exported function `name` from memory.
#define RECORDABLE(name)                                                              \
  EXPORT int64_t name##_recorded(const Argument* arguments, int64_t threads) {        \
    return call_with(name, arguments, threads);                                       \
  }
