// From the precision that a call names to the operand that its kernel is compiled for.
#pragma once

#include "tile.h"

namespace diffcore {
namespace DIFFCORE_ISA {

// body(operand), whose type is what the kernel takes.
template <class Body>
DIFFCORE_INLINE void with_operand(Precision precision, Body body) {
  if (precision == Precision::bfloat16) {
    body(Bfloat16Operand{});
  } else {
    body(Float32Operand{});
  }
}

}  // namespace DIFFCORE_ISA
}  // namespace diffcore
