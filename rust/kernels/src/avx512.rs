//! Sixteen lanes in one AVX-512 register.
//!
//! 256 bits are loaded by `lddqu`: for the portable baseline the compiler would split an ordinary unaligned load in two.

use std::arch::x86_64::*;

use crate::elementwise::{EXP_HIGH, EXP_LOW, EXP_POLYNOMIAL, LN2_HIGH, LN2_LOW, LOG2_E};
use crate::elementwise::{EXP2_LOW, EXP2_POLYNOMIAL};
use crate::simd::Simd;

/// AVX-512 F/BW/VL/DQ with VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// The sum of sixteen signed bytes, as that of bytes from 0 up.
#[inline(always)]
unsafe fn sum_i8(a: __m128i) -> i32 {
    unsafe {
        let from_zero = _mm_xor_si128(a, _mm_set1_epi8(-128));
        let halves = _mm_sad_epu8(from_zero, _mm_setzero_si128());
        let sum = _mm_add_epi64(halves, _mm_unpackhi_epi64(halves, halves));
        _mm_cvtsi128_si32(sum) - 16 * 128
    }
}

#[inline(always)]
unsafe fn bf16(pairs: __m512i) -> __m512bh {
    // SAFETY: the same 512 bits.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(pairs) }
}

/// The firsts and the seconds of sixteen pairs of bf16 as floats.
#[inline(always)]
unsafe fn bf16_pairs(pairs: __m512i) -> [__m512; 2] {
    unsafe {
        let seconds = _mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF_0000_u32 as i32));
        [
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
            _mm512_castsi512_ps(seconds),
        ]
    }
}

// SAFETY of all of it: the contract of `Simd`; `Isa::detect` hands this type out only where the features were detected.
impl Simd for Avx512 {
    type I = __m512i;
    type S = __m512i;
    type F = __m512;
    const ROWS: usize = 8;
    const MANY_ROWS: usize = 6;
    const MANY_TILES: usize = 2;
    const QUERIES: usize = 12;
    const SUMS: usize = 24;

    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, mask: u8) -> __m512i {
        unsafe { _mm512_and_si512(a, _mm512_set1_epi8(mask as i8)) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn shr_mask<const N: u32>(a: __m512i, mask: u8) -> __m512i {
        unsafe { Self::and(_mm512_srli_epi16::<N>(a), mask) }
    }
    #[inline(always)]
    unsafe fn shl_mask<const N: u32>(a: __m512i, mask: u8) -> __m512i {
        unsafe { Self::and(_mm512_slli_epi16::<N>(a), mask) }
    }
    #[inline(always)]
    unsafe fn lookup(a: __m512i, table: &[u8; 16]) -> __m512i {
        unsafe {
            let t = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(t, a)
        }
    }
    #[inline(always)]
    unsafe fn store_codes(p: *mut u8, a: __m512i) {
        unsafe { _mm512_storeu_si512(p.cast(), a) }
    }
    #[inline(always)]
    unsafe fn sums_zero() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn sums_splat(x: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(x) }
    }
    #[inline(always)]
    unsafe fn sums_add(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn sums_shl(a: __m512i, n: u32) -> __m512i {
        // The count in a register: the compiler makes a constant of it.
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn sums_shift(a: __m512i, n: i32) -> __m512i {
        unsafe { _mm512_sllv_epi32(a, _mm512_set1_epi32(n)) }
    }
    #[inline(always)]
    unsafe fn dot4<const SMALL: bool>(sum: __m512i, codes: __m512i, x: *const i8) -> __m512i {
        unsafe {
            _mm512_dpbusd_epi32(
                sum,
                codes,
                _mm512_set1_epi32(x.cast::<i32>().read_unaligned()),
            )
        }
    }
    #[inline(always)]
    unsafe fn to_f32(a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        // The second operand is what comes out where one is NaN.
        unsafe { _mm512_max_ps(b, a) }
    }
    #[inline(always)]
    unsafe fn abs(a: __m512) -> __m512 {
        unsafe { _mm512_abs_ps(a) }
    }
    #[inline(always)]
    unsafe fn largest(a: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    unsafe fn sum(a: __m512) -> f32 {
        unsafe {
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        }
    }
    #[inline(always)]
    unsafe fn exp(a: __m512) -> __m512 {
        unsafe {
            let set = |x| _mm512_set1_ps(x);
            let x = _mm512_max_ps(set(EXP_LOW), a);
            let x = _mm512_min_ps(set(EXP_HIGH), x);
            let n = _mm512_mul_ps(x, set(LOG2_E));
            let n = _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(n);
            let r = _mm512_fmadd_ps(n, set(-LN2_HIGH), x);
            let r = _mm512_fmadd_ps(n, set(-LN2_LOW), r);
            let mut p = set(EXP_POLYNOMIAL[0]);
            p = _mm512_fmadd_ps(p, r, set(EXP_POLYNOMIAL[1]));
            p = _mm512_fmadd_ps(p, r, set(EXP_POLYNOMIAL[2]));
            p = _mm512_fmadd_ps(p, r, set(EXP_POLYNOMIAL[3]));
            p = _mm512_fmadd_ps(p, r, set(EXP_POLYNOMIAL[4]));
            p = _mm512_fmadd_ps(p, r, set(EXP_POLYNOMIAL[5]));
            let p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
            let p = _mm512_add_ps(p, set(1.0));
            let n = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));
            _mm512_mul_ps(p, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(n)))
        }
    }
    #[inline(always)]
    unsafe fn keep_unequal(value: __m512, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(a, b), value) }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, a: __m512) -> i32 {
        unsafe {
            let ordered = _mm512_cmp_ps_mask::<_CMP_ORD_Q>(a, a);
            let codes = _mm512_maskz_cvtps_epi32(ordered, a);
            let codes = _mm512_cvtepi32_epi8(codes);
            _mm_storeu_si128(p.cast(), codes);
            sum_i8(codes)
        }
    }
    #[inline(always)]
    unsafe fn load_f32(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_lddqu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8, shift: u32, mask: u8) -> __m512 {
        unsafe {
            let b = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let b = _mm512_srl_epi32(b, _mm_cvtsi32_si128(shift as i32));
            _mm512_cvtepi32_ps(_mm512_and_si512(b, _mm512_set1_epi32(i32::from(mask))))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_e8m0(p: *const u8) -> __m512 {
        unsafe {
            let b = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
            let one = _mm512_set1_epi32(1);
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_sub_epi32(
                _mm512_max_epi32(b, one),
                one,
            )))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, a: __m512) {
        unsafe { _mm512_storeu_ps(p, a) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, a: __m512) {
        unsafe {
            // The second operand is what comes out where one is NaN.
            let a = _mm512_min_ps(_mm512_set1_ps(65504.0), a);
            let a = _mm512_max_ps(_mm512_set1_ps(-65504.0), a);
            let a = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a);
            _mm256_storeu_si256(p.cast(), a);
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, a: __m512) {
        unsafe {
            let bits = _mm512_castps_si512(a);
            let high = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            // Rounding could carry a NaN over into a number.
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
            let bits = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(bits));
        }
    }
    #[inline(always)]
    unsafe fn dot_bf16<const NATIVE: bool>(
        sum: __m512,
        weights: __m512i,
        x: *const [u16; 2],
    ) -> __m512 {
        unsafe {
            let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
            if NATIVE {
                return _mm512_dpbf16_ps(sum, bf16(weights), bf16(x));
            }
            let ([w0, w1], [x0, x1]) = (bf16_pairs(weights), bf16_pairs(x));
            _mm512_fmadd_ps(w0, x0, _mm512_fmadd_ps(w1, x1, sum))
        }
    }
    #[inline(always)]
    unsafe fn exp2(a: __m512) -> __m512 {
        unsafe {
            let x = _mm512_max_ps(_mm512_set1_ps(EXP2_LOW), a);
            let n = _mm512_cvtps_epi32(x);
            let r = _mm512_sub_ps(x, _mm512_cvtepi32_ps(n));
            let mut p = _mm512_set1_ps(EXP2_POLYNOMIAL[0]);
            for c in &EXP2_POLYNOMIAL[1..] {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
            }
            let p = _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32::<23>(n));
            _mm512_castsi512_ps(p)
        }
    }
}
