// SHA-256 (FIPS 180-4), to know a file from another.

#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace lingc {

class Sha256 {
 public:
  // In hexadecimal, as Python's hashlib writes it.
  static std::string of(std::string_view data) {
    Sha256 made;
    std::size_t at = 0;
    for (; at + 64 <= data.size(); at += 64) made.block(bytes(data) + at);
    std::uint8_t last[128] = {};
    std::size_t const rest = data.size() - at;
    for (std::size_t i = 0; i < rest; ++i) last[i] = bytes(data)[at + i];
    last[rest] = 0x80;
    std::size_t const size = rest < 56 ? 64 : 128;
    std::uint64_t const bits = 8 * static_cast<std::uint64_t>(data.size());
    for (int i = 0; i < 8; ++i) last[size - 1 - i] = static_cast<std::uint8_t>(bits >> 8 * i);
    for (std::size_t i = 0; i < size; i += 64) made.block(last + i);
    return made.text();
  }

 private:
  static std::uint8_t const* bytes(std::string_view data) {
    return reinterpret_cast<std::uint8_t const*>(data.data());
  }

  static std::uint32_t turned(std::uint32_t x, int by) { return x >> by | x << (32 - by); }

  void block(std::uint8_t const* data) {
    std::uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
      w[i] = std::uint32_t{data[4 * i]} << 24 | std::uint32_t{data[4 * i + 1]} << 16 |
             std::uint32_t{data[4 * i + 2]} << 8 | data[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i) {
      std::uint32_t const low = turned(w[i - 15], 7) ^ turned(w[i - 15], 18) ^ (w[i - 15] >> 3);
      std::uint32_t const high = turned(w[i - 2], 17) ^ turned(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + low + w[i - 7] + high;
    }
    auto [a, b, c, d, e, f, g, h] = state_;
    for (int i = 0; i < 64; ++i) {
      std::uint32_t const one = h + (turned(e, 6) ^ turned(e, 11) ^ turned(e, 25)) +
                                ((e & f) ^ (~e & g)) + kRound[i] + w[i];
      std::uint32_t const two =
          (turned(a, 2) ^ turned(a, 13) ^ turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + one, d = c, c = b, b = a, a = one + two;
    }
    std::uint32_t const added[] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state_[i] += added[i];
  }

  std::string text() const {
    std::string made;
    for (std::uint32_t const word : state_) {
      for (int shift = 28; shift >= 0; shift -= 4) made += "0123456789abcdef"[word >> shift & 15];
    }
    return made;
  }

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

  static constexpr std::uint32_t kRound[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4,
      0xab1c5ed5, 0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe,
      0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f,
      0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
      0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc,
      0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85, 0xa2bfe8a1, 0xa81a664b,
      0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116,
      0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7,
      0xc67178f2};
};

}  // namespace lingc
