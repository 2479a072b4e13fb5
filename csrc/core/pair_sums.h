// A row of logits from one reading with one exponential a pair: what is summed up, and what the sums say.
//
// With delta = a - b - centre, e^(a - centre) = e^b e^delta and
//
//   e^(a - centre) - e^b = e^b (e^delta - 1)
//
// with a polynomial for e^delta - 1, so that nothing subtracts nearby numbers. One e^b enters all sums: its error only
// weighs the pair a little differently.
//
// Exponentials are counted in units of 2^unit. Units are whole numbers, so changing them is exact. The centre has to lie
// where the weight of the row lies, or the sums lose what J subtracts; whoever finds a heavier pair moves there.
//
// A temperature divides differences once the centre is subtracted, so that what is 0 without it is 0 with it.
#pragma once

#include <math.h>

#include "core/numerics.h"

namespace fastpost {
inline namespace FASTPOST_ISA {

// Rounded, it takes exponentials of logits 1.3e-8 too large (kStretch), which is harmless if all of them are.
constexpr float kLog2e = 0x1.715476p+0f;
constexpr double kLn2 = 0x1.62e42fefa39efp-1;
constexpr double kStretch = kLog2e * kLn2;

// What logits are multiplied by: 1 / T, and that times log2(e).
struct Scale {
  float inverse, log2e;
};

// Without a temperature, where the compiler knows it.
struct Unscaled {
  static constexpr float inverse = 1.0f, log2e = kLog2e;
};

// By how much exponentials are taken of too large a logit.
template <class S>
FASTPOST_HD double stretch_of(const S& scale) {
  return static_cast<double>(scale.log2e) / scale.inverse * kLn2;
}

// Up to this |delta| a pair is near. Beyond, both its exponentials are summed up by themselves.
constexpr float kNear = 1.0f;

// Beyond, no centre lies: what is so far apart belongs to one stream alone.
constexpr float kFurthestCentre = 0x1p21f;

// (e^x - 1 - x) / x^2 for |x| <= kNear, within 2.8e-8 and rounding.
FASTPOST_HD float expm1_rest(float x) {
  float y = 0x1.a0b5dep-16f;
  y = fmaf(y, x, 0x1.aae014p-13f);
  y = fmaf(y, x, 0x1.6c341cp-10f);
  y = fmaf(y, x, 0x1.10f99cp-7f);
  y = fmaf(y, x, 0x1.5554e4p-5f);
  y = fmaf(y, x, 0x1.55558cp-3f);
  return fmaf(y, x, 0.5f);
}

// (e^x - 1) / x, likewise.
FASTPOST_HD float expm1_ratio(float x) { return fmaf(expm1_rest(x), x, 1.0f); }

// Sums over near pairs: e^b and e^b (e^delta - 1), both times delta as well, but of e^b (e^delta - 1) without delta only
// what is of second order, e^b (e^delta - 1 - delta): both directions of the KL come from that.
struct NearSums {
  double noised, second, noised_delta, excess_delta;

  FASTPOST_HD double excess() const { return noised_delta + second; }
};

// Sums over far pairs: e^a, e^b, and both times delta.
struct FarSums {
  double clean, noised, clean_delta, noised_delta;
};

// Part of a row. e^b is counted in 2^unit, e^a of far pairs in 2^clean_unit.
struct RowPart {
  float unit, clean_unit, centre;
  NearSums near;
  FarSums far;
};

FASTPOST_HD double power_of_two(double exponent) {
  const double kept = exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
  const int64_t bits = (static_cast<int64_t>(kept) + 1023) << 52;
  double power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// The whole number below log2(x), for x > 0 in the normal range.
FASTPOST_HD double exponent_of(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<double>((bits >> 52) - 1023);
}

// What e^(a - centre) in 2^unit, times this, is in 2^clean_unit.
template <class S>
FASTPOST_HD double clean_factor(float unit, float centre, float clean_unit, const S& scale) {
  return exp2(static_cast<double>(scale.log2e) * centre + (static_cast<double>(unit) - clean_unit));
}

// The same sums in other units, about another centre.
template <class S>
FASTPOST_HD RowPart moved(RowPart part, float unit, float clean_unit, float centre, const S& scale) {
  const double shift = (static_cast<double>(part.centre) - centre) * scale.inverse;
  NearSums& near = part.near;
  FarSums& far = part.far;
  if (shift != 0) {
    if (fabs(shift) <= kNear) {
      // e^(delta + shift) - 1 = (e^delta - 1) + (e^shift - 1) e^delta
      const double growth = expm1(shift), before = near.excess();
      const double excess = before + growth * (near.noised + before);
      const double second = near.second + growth * before + (growth - shift) * near.noised;
      const double excess_delta = near.excess_delta + growth * (near.noised_delta + near.excess_delta) + shift * excess;
      near = {near.noised, second, near.noised_delta + shift * near.noised, excess_delta};
    } else if (near.noised > 0) {
      const double factor = clean_factor(part.unit, part.centre, part.clean_unit, scale);
      far = {far.clean + factor * (near.noised + near.excess()), far.noised + near.noised,
             far.clean_delta + factor * (near.noised_delta + near.excess_delta), far.noised_delta + near.noised_delta};
      near = {};
    }
    far.clean_delta += shift * far.clean;
    far.noised_delta += shift * far.noised;
  }
  const double shrink = power_of_two(static_cast<double>(part.unit) - unit);
  const double clean_shrink = power_of_two(static_cast<double>(part.clean_unit) - clean_unit);
  near = {shrink * near.noised, shrink * near.second, shrink * near.noised_delta, shrink * near.excess_delta};
  far = {clean_shrink * far.clean, shrink * far.noised, clean_shrink * far.clean_delta, shrink * far.noised_delta};
  part.unit = unit;
  part.clean_unit = clean_unit;
  part.centre = centre;
  return part;
}

// What the sums of a row say.
struct RowMeaning {
  double clean, noised;          // the sums of e^a in 2^clean_unit, of e^b in 2^unit
  double noised_mean;            // of delta
  double log_ratio;              // r = log p - log q = delta - log_ratio
  double clean_kl, noised_kl;    // KL(p|q), KL(q|p)
  double divergence;             // J
  double log_clean, log_noised;  // log of the sum of e^a, of e^b
  bool off_centre;               // the centre was none: J has lost digits
  double clean_mean;             // of delta, where classes weigh p
};

struct Logs {
  double clean, noised, ratio;
};

// logs_of(a, b, c) gives the three logarithms, in turn or side by side.
template <class S, class LogsOf>
FASTPOST_HD RowMeaning meaning_of(const RowPart& part, const S& scale, const LogsOf& logs_of) {
  const NearSums& near = part.near;
  const FarSums& far = part.far;
  const double factor =
      clean_factor(part.unit, part.centre, part.clean_unit, scale);  // may be 0 or infinite if all pairs are far
  const bool any_near = near.noised > 0, any_far = far.clean > 0;
  RowMeaning row;
  row.clean = (any_near ? factor * (near.noised + near.excess()) : 0) + far.clean;
  row.noised = near.noised + far.noised;
  const double per_noised = 1 / row.noised;
  row.noised_mean = (near.noised_delta + far.noised_delta) * per_noised;
  // Far pairs of the clean stream in the others' units: infinite where the streams have nothing in common.
  const double excess = near.excess() + ((any_far ? far.clean / factor : 0) - far.noised);
  const double growth = excess * per_noised;  // e^log_ratio - 1
  const double clean_mean =
      ((any_near ? factor * (near.noised_delta + near.excess_delta) : 0) + far.clean_delta) / row.clean;  // E_p[delta]
  const bool alike = fabs(growth) < 0.5;
  const double grown = 1 + growth, stretch = stretch_of(scale);
  const Logs logs = logs_of(row.clean, row.noised, alike ? grown : row.clean * per_noised);
  row.log_clean = (logs.clean + part.clean_unit * kLn2) / stretch;
  row.log_noised = (logs.noised + part.unit * kLn2) / stretch;
  row.clean_mean = clean_mean;
  if (alike) {
    const double excess_delta = near.excess_delta + ((any_far ? far.clean_delta / factor : 0) - far.noised_delta);
    const double kept = grown - 1;  // growth as far as `grown` holds it
    row.log_ratio = kept == 0 ? growth : logs.ratio * (growth / kept);
    row.divergence = (excess_delta - row.noised_mean * excess) / (row.noised + excess);
    // Sums of second order, less what the centre is off, likewise.
    const double second = near.second + ((any_far ? far.clean / factor : 0) - far.noised - far.noised_delta);
    const double lost = growth - row.log_ratio;
    row.noised_kl = second * per_noised - lost;
    // Without the far pairs' noised_delta, which is in both sums of second order and may be as large as a float is.
    const double clean_second =
        near.excess_delta - near.second + ((any_far ? (far.clean_delta - far.clean) / factor : 0) + far.noised);
    row.clean_kl = clean_second / (row.noised + excess) - (growth * growth / grown - lost);
  } else {
    row.log_ratio = (logs.ratio + (static_cast<double>(part.clean_unit) - part.unit) * kLn2) / stretch -
                    static_cast<double>(part.centre) * scale.inverse;
    row.divergence = clean_mean - row.noised_mean;
    row.clean_kl = clean_mean - row.log_ratio;
    row.noised_kl = row.log_ratio - row.noised_mean;
  }
  if (row.divergence < 0) row.divergence = 0;
  // A class that the clean stream all but rules out draws the noised mean alone away: the centre would not be better there.
  row.off_centre = row.noised_mean * row.noised_mean > 8 * row.divergence &&
                   2 * fabs(row.clean_mean) > fabs(row.noised_mean) && fabs(row.noised_mean) < kFurthestCentre;
  return row;
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
