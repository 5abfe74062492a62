//! Sixteen lanes in two AVX2 registers, with and without 256-bit VNNI.
//!
//! Loads are `lddqu`: for the portable baseline the compiler would split an ordinary unaligned load of 256 bits in two.

use std::arch::x86_64::*;

use crate::elementwise::{EXP_HIGH, EXP_LOW, EXP_POLYNOMIAL, LN2_HIGH, LN2_LOW, LOG2_E};
use crate::elementwise::{EXP2_LOW, EXP2_POLYNOMIAL};
use crate::simd::Simd;

/// AVX2 + FMA + F16C; integer dots by `vpmaddubsw` or, where 8-bit codes would overflow it, by widening.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// The same with `vpdpbusd`.
#[derive(Clone, Copy)]
pub(crate) struct AvxVnni;

/// Four-byte dots of unsigned `codes` with signed `x`, exact: by `vpmaddubsw` where two products fit its 16 bits, else
/// even and odd bytes widened apart.
#[inline(always)]
unsafe fn dot4_widening<const SMALL: bool>(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
    unsafe {
        if SMALL {
            let pairs = _mm256_maddubs_epi16(codes, x);
            return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        }
        let even = _mm256_and_si256(codes, _mm256_set1_epi16(0x00FF));
        let odd = _mm256_srli_epi16::<8>(codes);
        let x_even = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x));
        let x_odd = _mm256_srai_epi16::<8>(x);
        let dots = _mm256_add_epi32(
            _mm256_madd_epi16(even, x_even),
            _mm256_madd_epi16(odd, x_odd),
        );
        _mm256_add_epi32(sum, dots)
    }
}

#[inline(always)]
unsafe fn dot4_vnni<const SMALL: bool>(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
    unsafe { _mm256_dpbusd_avx_epi32(sum, codes, x) }
}

macro_rules! both {
    ($f:expr, $a:expr) => {
        [$f($a[0]), $f($a[1])]
    };
    ($f:expr, $a:expr, $b:expr) => {
        [$f($a[0], $b[0]), $f($a[1], $b[1])]
    };
    ($f:expr, $a:expr, $b:expr, $c:expr) => {
        [$f($a[0], $b[0], $c[0]), $f($a[1], $b[1], $c[1])]
    };
}

/// Sixteen bytes widened to two vectors of eight 32-bit integers.
#[inline(always)]
unsafe fn widen_u8(p: *const u8) -> [__m256i; 2] {
    unsafe {
        [
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast())),
        ]
    }
}

/// The firsts and the seconds of eight pairs of bf16 as floats.
#[inline(always)]
unsafe fn bf16_pairs(pairs: __m256i) -> [__m256; 2] {
    unsafe {
        let seconds = _mm256_and_si256(pairs, _mm256_set1_epi32(0xFFFF_0000_u32 as i32));
        [
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)),
            _mm256_castsi256_ps(seconds),
        ]
    }
}

/// Eight floats as bf16, to nearest even, in 32 bits each.
#[inline(always)]
unsafe fn to_bf16_half(a: __m256) -> __m256i {
    unsafe {
        let bits = _mm256_castps_si256(a);
        let high = _mm256_srli_epi32::<16>(bits);
        let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
        let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
        let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
        // Rounding could carry a NaN over into a number.
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
        let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
        _mm256_blendv_epi8(rounded, quiet, nan)
    }
}

/// Eight e8m0 exponents as half the power of two each means.
#[inline(always)]
unsafe fn e8m0_half(e: __m256i) -> __m256 {
    unsafe {
        let one = _mm256_set1_epi32(1);
        let e = _mm256_sub_epi32(_mm256_max_epi32(e, one), one);
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(e))
    }
}

/// Eight floats as f16, clamped.
#[inline(always)]
unsafe fn f16_half(a: __m256) -> __m128i {
    unsafe {
        // The second operand is what comes out where one is NaN.
        let a = _mm256_min_ps(_mm256_set1_ps(65504.0), a);
        let a = _mm256_max_ps(_mm256_set1_ps(-65504.0), a);
        _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a)
    }
}

/// See `elementwise::exp`.
#[inline(always)]
unsafe fn exp_half(a: __m256) -> __m256 {
    unsafe {
        let set = |x| _mm256_set1_ps(x);
        let x = _mm256_max_ps(set(EXP_LOW), a);
        let x = _mm256_min_ps(set(EXP_HIGH), x);
        let n = _mm256_mul_ps(x, set(LOG2_E));
        let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(n);
        let r = _mm256_fmadd_ps(n, set(-LN2_HIGH), x);
        let r = _mm256_fmadd_ps(n, set(-LN2_LOW), r);
        let mut p = set(EXP_POLYNOMIAL[0]);
        p = _mm256_fmadd_ps(p, r, set(EXP_POLYNOMIAL[1]));
        p = _mm256_fmadd_ps(p, r, set(EXP_POLYNOMIAL[2]));
        p = _mm256_fmadd_ps(p, r, set(EXP_POLYNOMIAL[3]));
        p = _mm256_fmadd_ps(p, r, set(EXP_POLYNOMIAL[4]));
        p = _mm256_fmadd_ps(p, r, set(EXP_POLYNOMIAL[5]));
        let p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
        let p = _mm256_add_ps(p, set(1.0));
        let n = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
        _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(n)))
    }
}

/// See `elementwise::exp2`.
#[inline(always)]
unsafe fn exp2_half(a: __m256) -> __m256 {
    unsafe {
        let x = _mm256_max_ps(_mm256_set1_ps(EXP2_LOW), a);
        let n = _mm256_cvtps_epi32(x);
        let r = _mm256_sub_ps(x, _mm256_cvtepi32_ps(n));
        let mut p = _mm256_set1_ps(EXP2_POLYNOMIAL[0]);
        for c in &EXP2_POLYNOMIAL[1..] {
            p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
        }
        let p = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32::<23>(n));
        _mm256_castsi256_ps(p)
    }
}

/// Eight floats to integers, to nearest even, NaN to 0.
#[inline(always)]
unsafe fn round_half(a: __m256) -> __m256i {
    unsafe { _mm256_cvtps_epi32(_mm256_and_ps(a, _mm256_cmp_ps::<_CMP_ORD_Q>(a, a))) }
}

macro_rules! implement {
    ($name:ident, $dot4:ident) => {
        // SAFETY of all of it: the contract of `Simd`; `Isa::detect` hands this type out only where the features
        // were detected.
        impl Simd for $name {
            type I = [__m256i; 2];
            type S = [__m256i; 2];
            type F = [__m256; 2];
            const ROWS: usize = 4;
            const MANY_ROWS: usize = 4;
            const MANY_TILES: usize = 1;
            const QUERIES: usize = 6;
            const SUMS: usize = 4;

            #[inline(always)]
            unsafe fn load(p: *const u8) -> Self::I {
                unsafe {
                    [
                        _mm256_lddqu_si256(p.cast()),
                        _mm256_lddqu_si256(p.add(32).cast()),
                    ]
                }
            }
            #[inline(always)]
            unsafe fn and(a: Self::I, mask: u8) -> Self::I {
                unsafe {
                    let m = [_mm256_set1_epi8(mask as i8); 2];
                    both!(_mm256_and_si256, a, m)
                }
            }
            #[inline(always)]
            unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
                unsafe { both!(_mm256_or_si256, a, b) }
            }
            #[inline(always)]
            unsafe fn shr_mask<const N: u32>(a: Self::I, mask: u8) -> Self::I {
                // The count in a register: `_mm256_srli_epi16` wants an i32 constant, the trait has u32.
                unsafe {
                    let n = _mm_cvtsi32_si128(N as i32);
                    Self::and([_mm256_srl_epi16(a[0], n), _mm256_srl_epi16(a[1], n)], mask)
                }
            }
            #[inline(always)]
            unsafe fn shl_mask<const N: u32>(a: Self::I, mask: u8) -> Self::I {
                unsafe {
                    let n = _mm_cvtsi32_si128(N as i32);
                    Self::and([_mm256_sll_epi16(a[0], n), _mm256_sll_epi16(a[1], n)], mask)
                }
            }
            #[inline(always)]
            unsafe fn lookup(a: Self::I, table: &[u8; 16]) -> Self::I {
                unsafe {
                    let t =
                        [_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())); 2];
                    both!(_mm256_shuffle_epi8, t, a)
                }
            }
            #[inline(always)]
            unsafe fn store_codes(p: *mut u8, a: Self::I) {
                unsafe {
                    _mm256_storeu_si256(p.cast(), a[0]);
                    _mm256_storeu_si256(p.add(32).cast(), a[1]);
                }
            }
            #[inline(always)]
            unsafe fn sums_zero() -> Self::S {
                unsafe { [_mm256_setzero_si256(); 2] }
            }
            #[inline(always)]
            unsafe fn sums_splat(x: i32) -> Self::S {
                unsafe { [_mm256_set1_epi32(x); 2] }
            }
            #[inline(always)]
            unsafe fn sums_add(a: Self::S, b: Self::S) -> Self::S {
                unsafe { both!(_mm256_add_epi32, a, b) }
            }
            #[inline(always)]
            unsafe fn sums_shl(a: Self::S, n: u32) -> Self::S {
                unsafe {
                    let n = _mm_cvtsi32_si128(n as i32);
                    [_mm256_sll_epi32(a[0], n), _mm256_sll_epi32(a[1], n)]
                }
            }
            #[inline(always)]
            unsafe fn sums_shift(a: Self::S, n: i32) -> Self::S {
                unsafe {
                    let n = [_mm256_set1_epi32(n); 2];
                    both!(_mm256_sllv_epi32, a, n)
                }
            }
            #[inline(always)]
            unsafe fn dot4<const SMALL: bool>(
                sum: Self::S,
                codes: Self::I,
                x: *const i8,
            ) -> Self::S {
                unsafe {
                    let x = [_mm256_set1_epi32(x.cast::<i32>().read_unaligned()); 2];
                    both!($dot4::<SMALL>, sum, codes, x)
                }
            }
            #[inline(always)]
            unsafe fn to_f32(a: Self::S) -> Self::F {
                unsafe { both!(_mm256_cvtepi32_ps, a) }
            }
            #[inline(always)]
            unsafe fn splat(x: f32) -> Self::F {
                unsafe { [_mm256_set1_ps(x); 2] }
            }
            #[inline(always)]
            unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
                unsafe { both!(_mm256_mul_ps, a, b) }
            }
            #[inline(always)]
            unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
                unsafe { both!(_mm256_add_ps, a, b) }
            }
            #[inline(always)]
            unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
                unsafe { both!(_mm256_fmadd_ps, a, b, c) }
            }
            #[inline(always)]
            unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
                unsafe { both!(_mm256_div_ps, a, b) }
            }
            #[inline(always)]
            unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
                // The second operand is what comes out where one is NaN.
                unsafe { both!(_mm256_max_ps, b, a) }
            }
            #[inline(always)]
            unsafe fn abs(a: Self::F) -> Self::F {
                unsafe {
                    let sign = [_mm256_set1_ps(-0.0); 2];
                    both!(_mm256_andnot_ps, sign, a)
                }
            }
            #[inline(always)]
            unsafe fn largest(a: Self::F) -> f32 {
                unsafe {
                    let a = _mm256_max_ps(a[0], a[1]);
                    let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                    let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
                    _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
                }
            }
            #[inline(always)]
            unsafe fn sum(a: Self::F) -> f32 {
                unsafe {
                    let a = _mm256_add_ps(a[0], a[1]);
                    let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
                    let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
                    _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
                }
            }
            #[inline(always)]
            unsafe fn exp(a: Self::F) -> Self::F {
                unsafe { both!(exp_half, a) }
            }
            #[inline(always)]
            unsafe fn keep_unequal(value: Self::F, a: Self::F, b: Self::F) -> Self::F {
                unsafe {
                    let differ = both!(_mm256_cmp_ps::<_CMP_NEQ_UQ>, a, b);
                    both!(_mm256_and_ps, value, differ)
                }
            }
            #[inline(always)]
            unsafe fn store_i8(p: *mut i8, a: Self::F) -> i32 {
                unsafe {
                    let codes = both!(round_half, a);
                    let words = _mm256_packs_epi32(codes[0], codes[1]);
                    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
                    let bytes = _mm_packs_epi16(
                        _mm256_castsi256_si128(words),
                        _mm256_extracti128_si256::<1>(words),
                    );
                    _mm_storeu_si128(p.cast(), bytes);
                    // Sixteen words to eight sums, then to one.
                    let sums = _mm256_madd_epi16(words, _mm256_set1_epi16(1));
                    let sums = _mm_add_epi32(
                        _mm256_castsi256_si128(sums),
                        _mm256_extracti128_si256::<1>(sums),
                    );
                    let sums = _mm_add_epi32(sums, _mm_shuffle_epi32::<0b01_00_11_10>(sums));
                    let sums = _mm_add_epi32(sums, _mm_shuffle_epi32::<0b00_00_00_01>(sums));
                    _mm_cvtsi128_si32(sums)
                }
            }
            #[inline(always)]
            unsafe fn load_f32(p: *const f32) -> Self::F {
                unsafe {
                    [
                        _mm256_castsi256_ps(_mm256_lddqu_si256(p.cast())),
                        _mm256_castsi256_ps(_mm256_lddqu_si256(p.add(8).cast())),
                    ]
                }
            }
            #[inline(always)]
            unsafe fn load_f16(p: *const u16) -> Self::F {
                unsafe {
                    [
                        _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                        _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
                    ]
                }
            }
            #[inline(always)]
            unsafe fn load_u8(p: *const u8, shift: u32, mask: u8) -> Self::F {
                unsafe {
                    let n = _mm_cvtsi32_si128(shift as i32);
                    let m = _mm256_set1_epi32(i32::from(mask));
                    let b = widen_u8(p);
                    [
                        _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(b[0], n), m)),
                        _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(b[1], n), m)),
                    ]
                }
            }
            #[inline(always)]
            unsafe fn load_i8(p: *const u8) -> Self::F {
                unsafe {
                    [
                        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))),
                        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast()))),
                    ]
                }
            }
            #[inline(always)]
            unsafe fn load_e8m0(p: *const u8) -> Self::F {
                unsafe { both!(e8m0_half, widen_u8(p)) }
            }
            #[inline(always)]
            unsafe fn store(p: *mut f32, a: Self::F) {
                unsafe {
                    _mm256_storeu_ps(p, a[0]);
                    _mm256_storeu_ps(p.add(8), a[1]);
                }
            }
            #[inline(always)]
            unsafe fn store_f16(p: *mut u16, a: Self::F) {
                unsafe {
                    _mm_storeu_si128(p.cast(), f16_half(a[0]));
                    _mm_storeu_si128(p.add(8).cast(), f16_half(a[1]));
                }
            }
            #[inline(always)]
            unsafe fn store_bf16(p: *mut u16, a: Self::F) {
                unsafe {
                    let [low, high] = both!(to_bf16_half, a);
                    let bits = _mm256_packus_epi32(low, high);
                    let bits = _mm256_permute4x64_epi64::<0b11_01_10_00>(bits);
                    _mm256_storeu_si256(p.cast(), bits);
                }
            }
            #[inline(always)]
            unsafe fn dot_bf16<const NATIVE: bool>(
                sum: Self::F,
                weights: Self::I,
                x: *const [u16; 2],
            ) -> Self::F {
                unsafe {
                    let x = bf16_pairs(_mm256_set1_epi32(x.cast::<i32>().read_unaligned()));
                    let w = both!(bf16_pairs, weights);
                    [
                        _mm256_fmadd_ps(w[0][0], x[0], _mm256_fmadd_ps(w[0][1], x[1], sum[0])),
                        _mm256_fmadd_ps(w[1][0], x[0], _mm256_fmadd_ps(w[1][1], x[1], sum[1])),
                    ]
                }
            }
            #[inline(always)]
            unsafe fn exp2(a: Self::F) -> Self::F {
                unsafe { both!(exp2_half, a) }
            }
        }
    };
}

implement!(Avx2, dot4_widening);
implement!(AvxVnni, dot4_vnni);
