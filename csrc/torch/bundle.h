// Arguments that belong together, as one struct. Its fields are listed once: the list makes the
// struct, its part of the schema, and the way there from torch's flat row of arguments.
#pragma once

#include <utility>

#include "tensor.h"

namespace moekernels::binding {

template <class T>
inline constexpr const char* kSchemaType = nullptr;
template <>
inline constexpr const char* kSchemaType<Tensor> = "Tensor";
template <>
inline constexpr const char* kSchemaType<OptionalTensor> = "Tensor?";
template <>
inline constexpr const char* kSchemaType<std::string> = "str";
template <>
inline constexpr const char* kSchemaType<int64_t> = "SymInt";
template <>
inline constexpr const char* kSchemaType<double> = "float";
template <>
inline constexpr const char* kSchemaType<bool> = "bool";

#define MOEKERNELS_FIELD(type, name) type name;
#define MOEKERNELS_FIELD_TYPE(type, name) , type
#define MOEKERNELS_FIELD_SCHEMA(type, name) +kSchemaType<type> + " " #name ", "

// With FIELDS(F) defined as F(Tensor, x) F(bool, tf32) ...: MOEKERNELS_BUNDLE(Name, FIELDS)
#define MOEKERNELS_BUNDLE(Name, FIELDS)                                                   \
  struct Name {                                                                           \
    FIELDS(MOEKERNELS_FIELD)                                                              \
    using Types = std::tuple<void FIELDS(MOEKERNELS_FIELD_TYPE)>;                         \
    static std::string schema() { return std::string() FIELDS(MOEKERNELS_FIELD_SCHEMA); } \
  }

// Flat<&op>::call, which TORCH_BOX takes: op(const Bundle&, Rest...) with the bundle's fields as
// arguments of their own, before the others.
template <auto op, class Signature = decltype(op), class Types = void>
struct Flat;
template <auto op, class Result, class Bundle, class... Rest>
struct Flat<op, Result (*)(const Bundle&, Rest...), void>
    : Flat<op, Result (*)(const Bundle&, Rest...), typename Bundle::Types> {};
template <auto op, class Result, class Bundle, class... Rest, class... Fields>
struct Flat<op, Result (*)(const Bundle&, Rest...), std::tuple<void, Fields...>> {
  static Result call(Fields... fields, Rest... rest) {
    return op(Bundle{std::move(fields)...}, std::forward<Rest>(rest)...);
  }
};

}  // namespace moekernels::binding
