// Loads and stores of single elements of the caller's arrays, whatever their type.
#pragma once

#include "cuda/arch/device.h"
#include "cuda/types.h"
#include "include/rbm/math.h"

namespace rbm::cuda {

RBM_HD float float_of_half(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
  // Subnormal halves are small integers; infinities and NaN keep a full exponent.
  if (magnitude < 0x400u) {
    const float value = mul(static_cast<float>(magnitude), 5.9604644775390625e-08f);
    return sign ? -value : value;
  }
  const uint32_t exponent = magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u;
  return as_float(static_cast<int32_t>(sign | ((magnitude << 13) + exponent)));
}

RBM_HD float load_element(const void* data, Element element, int64_t index) {
  switch (element) {
    case Element::float32:
      return static_cast<const float*>(data)[index];
    case Element::float16:
      return float_of_half(static_cast<const uint16_t*>(data)[index]);
    case Element::bfloat16:
      return as_float(static_cast<int32_t>(
          static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16));
    default:
      return static_cast<float>(static_cast<const uint8_t*>(data)[index]);
  }
}

// Calls body(Typed<element>{}): within it loads have no branches, so that many are in flight.
template <Element element> struct Typed {
  static constexpr Element value = element;
};
template <class Body> RBM_DEVICE void with_element(Element element, const Body& body) {
  switch (element) {
    case Element::float32:
      return body(Typed<Element::float32>{});
    case Element::float16:
      return body(Typed<Element::float16>{});
    case Element::bfloat16:
      return body(Typed<Element::bfloat16>{});
    default:
      return body(Typed<Element::byte>{});
  }
}

// A state of 0 or 1, in any element type.
RBM_HD void store_bit(void* data, Element element, int64_t index, bool on) {
  switch (element) {
    case Element::float32:
      static_cast<float*>(data)[index] = on ? 1.0f : 0.0f;
      break;
    case Element::float16:
      static_cast<uint16_t*>(data)[index] = on ? 0x3C00 : 0;
      break;
    case Element::bfloat16:
      static_cast<uint16_t*>(data)[index] = on ? 0x3F80 : 0;
      break;
    default:
      static_cast<uint8_t*>(data)[index] = on;
  }
}

// Four of them, at an index that is a multiple of four in an array that is aligned to 16 bytes.
RBM_HD void store_four_bits(void* data, Element element, int64_t index, uint32_t nibble) {
  const uint32_t bytes = ((nibble & 0xFu) * 0x00204081u) & 0x01010101u;
  if (element == Element::byte) {
    static_cast<uint32_t*>(data)[index / 4] = bytes;
    return;
  }
  if (element == Element::float32) {
    float* out = static_cast<float*>(data) + index;
    for (int i = 0; i < 4; ++i) out[i] = (nibble >> i & 1u) ? 1.0f : 0.0f;
    return;
  }
  const uint32_t one = element == Element::float16 ? 0x3C00u : 0x3F80u;
  uint32_t* out = static_cast<uint32_t*>(data) + index / 2;
  out[0] = (bytes & 1u) * one + ((bytes >> 8) & 1u) * (one << 16);
  out[1] = ((bytes >> 16) & 1u) * one + (bytes >> 24) * (one << 16);
}

}  // namespace rbm::cuda
