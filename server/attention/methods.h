// The specifications of all methods, each defined in a file of its own in this folder and listed in
// methods.inc (docs/adding_a_method.md).
#pragma once

#include <cstdint>

#include "kernels/selection.h"
#include "server/attention/attention_method.h"

namespace vsprefill::attention {

#define VSP_METHOD(function) MethodSpec function();
#include "server/attention/methods.inc"
#undef VSP_METHOD

/// What method vsprefill selects with by default for a prompt of this many tokens, the threshold's
/// dependence on the length included; for measurements outside the server.
kernels::SelectionParams DefaultSelection(int64_t prompt_tokens);

}  // namespace vsprefill::attention
