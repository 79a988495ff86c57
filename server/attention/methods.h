// The specifications of all methods, one function per file of this folder. A new method is one
// file, one line here and one in registry.cc.
#pragma once

#include "server/attention/attention_method.h"

namespace vsprefill::attention {

MethodSpec DenseSpec();
MethodSpec VsPrefillSpec();

}  // namespace vsprefill::attention
