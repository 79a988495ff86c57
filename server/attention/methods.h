// The specifications of all methods, one function per file of this folder. A new method is one
// file, one line here and one in registry.cc.
#pragma once

#include <cstdint>

#include "kernels/selection.h"
#include "server/attention/attention_method.h"

namespace vsprefill::attention {

MethodSpec DenseSpec();
MethodSpec VsPrefillSpec();

/// What method vsprefill selects with by default for a prompt of this many tokens, the threshold's
/// dependence on the length included; for measurements outside the server.
kernels::SelectionParams DefaultSelection(int64_t prompt_tokens);

}  // namespace vsprefill::attention
