// The two macros that carry absl::Status through functions (Debian's Abseil has none).
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

/// Returns the status of `expr` from the enclosing function unless it is OK.
#define VSP_RETURN_IF_ERROR(expr)                               \
  do {                                                          \
    if (::absl::Status vsp_status = (expr); !vsp_status.ok()) { \
      return vsp_status;                                        \
    }                                                           \
  } while (false)

/// `lhs` = value of the absl::StatusOr `expr`; returns its status where it is an error. `lhs` may
/// declare a variable. A declaration with a comma in its type needs parentheses or an alias.
#define VSP_ASSIGN_OR_RETURN(lhs, ...) \
  VSP_ASSIGN_OR_RETURN_IMPL_(VSP_STATUS_CONCAT_(vsp_statusor_, __LINE__), lhs, (__VA_ARGS__))

#define VSP_ASSIGN_OR_RETURN_IMPL_(statusor, lhs, expr) \
  auto statusor = expr;                                 \
  if (!statusor.ok()) {                                 \
    return std::move(statusor).status();                \
  }                                                     \
  lhs = *std::move(statusor)

#define VSP_STATUS_CONCAT_INNER_(a, b) a##b
#define VSP_STATUS_CONCAT_(a, b) VSP_STATUS_CONCAT_INNER_(a, b)
