//! Sixteen lanes in four NEON registers: plain, with dot products (`dotprod`) and with those of mixed signs (`i8mm`).
//!
//! Checked against plain code in an emulator alone: nothing here has been timed, so that the numbers of rows and sums are
//! what fits 32 registers. Instructions whose intrinsics are not stable are written as assembly.

use std::arch::aarch64::*;
use std::arch::asm;
use std::marker::PhantomData;

use crate::elementwise::{EXP_HIGH, EXP_LOW, EXP_POLYNOMIAL, LN2_HIGH, LN2_LOW, LOG2_E};
use crate::elementwise::{EXP2_LOW, EXP2_POLYNOMIAL};
use crate::simd::Simd;

/// How integers are multiplied; all else needs nothing that some aarch64 CPU lacks.
pub(crate) trait Dot: Copy {
    /// `Simd::CENTRED`
    const CENTRED: bool;
    /// `Simd::MANY_ROWS`: what the sums, and the products on their way to them, leave room for.
    const MANY_ROWS: usize;
    /// `Simd::dot4` of four lanes; `x` is the four bytes four times.
    ///
    /// # Safety
    /// The CPU must have the instructions.
    unsafe fn dot4<const SMALL: bool>(sum: int32x4_t, codes: uint8x16_t, x: int8x16_t)
    -> int32x4_t;
}

/// Sixteen lanes, multiplied by `D`.
#[derive(Clone, Copy)]
pub(crate) struct Neon<D>(PhantomData<D>);

/// By 16-bit products: every aarch64 CPU.
#[derive(Clone, Copy)]
pub(crate) struct Widening;

/// By `sdot`.
#[derive(Clone, Copy)]
pub(crate) struct Dotprod;

/// By `usdot`.
#[derive(Clone, Copy)]
pub(crate) struct I8mm;

impl Dot for Widening {
    const CENTRED: bool = true;
    const MANY_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn dot4<const SMALL: bool>(
        sum: int32x4_t,
        codes: uint8x16_t,
        x: int8x16_t,
    ) -> int32x4_t {
        unsafe {
            let codes = signed::<SMALL>(codes);
            let low = vmull_s8(vget_low_s8(codes), vget_low_s8(x));
            let high = vmull_high_s8(codes, x);
            if SMALL {
                // Two products fit 16 bits.
                return vpadalq_s16(sum, vpaddq_s16(low, high));
            }
            vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)))
        }
    }
}

impl Dot for Dotprod {
    const CENTRED: bool = true;
    const MANY_ROWS: usize = 6;

    #[inline(always)]
    unsafe fn dot4<const SMALL: bool>(
        mut sum: int32x4_t,
        codes: uint8x16_t,
        x: int8x16_t,
    ) -> int32x4_t {
        unsafe {
            asm!(
                "sdot {sum:v}.4s, {codes:v}.16b, {x:v}.16b",
                sum = inout(vreg) sum,
                codes = in(vreg) signed::<SMALL>(codes),
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
            sum
        }
    }
}

impl Dot for I8mm {
    const CENTRED: bool = false;
    const MANY_ROWS: usize = 6;

    #[inline(always)]
    unsafe fn dot4<const SMALL: bool>(
        mut sum: int32x4_t,
        codes: uint8x16_t,
        x: int8x16_t,
    ) -> int32x4_t {
        unsafe {
            asm!(
                "usdot {sum:v}.4s, {codes:v}.16b, {x:v}.16b",
                sum = inout(vreg) sum,
                codes = in(vreg) codes,
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
            sum
        }
    }
}

/// Codes as signed bytes: what is `SMALL` is one, of the others 128 are taken off.
#[inline(always)]
unsafe fn signed<const SMALL: bool>(codes: uint8x16_t) -> int8x16_t {
    unsafe {
        vreinterpretq_s8_u8(match SMALL {
            true => codes,
            false => veorq_u8(codes, vdupq_n_u8(128)),
        })
    }
}

macro_rules! four {
    ($f:expr, $a:expr) => {
        [$f($a[0]), $f($a[1]), $f($a[2]), $f($a[3])]
    };
    ($f:expr, $a:expr, $b:expr) => {
        [
            $f($a[0], $b[0]),
            $f($a[1], $b[1]),
            $f($a[2], $b[2]),
            $f($a[3], $b[3]),
        ]
    };
}

/// A shift by a constant that is a `u32`: the intrinsics want an `i32`.
macro_rules! shift {
    ($f:ident, $n:expr, $a:expr) => {
        match $n {
            1 => four!($f::<1>, $a),
            2 => four!($f::<2>, $a),
            3 => four!($f::<3>, $a),
            4 => four!($f::<4>, $a),
            5 => four!($f::<5>, $a),
            6 => four!($f::<6>, $a),
            7 => four!($f::<7>, $a),
            _ => $a,
        }
    };
}

/// Sixteen bytes widened to four vectors of 32-bit integers.
#[inline(always)]
unsafe fn widen_u8(b: uint8x16_t) -> [uint32x4_t; 4] {
    unsafe {
        let (low, high) = (vmovl_u8(vget_low_u8(b)), vmovl_high_u8(b));
        [
            vmovl_u16(vget_low_u16(low)),
            vmovl_high_u16(low),
            vmovl_u16(vget_low_u16(high)),
            vmovl_high_u16(high),
        ]
    }
}

#[inline(always)]
unsafe fn widen_i8(b: int8x16_t) -> [int32x4_t; 4] {
    unsafe {
        let (low, high) = (vmovl_s8(vget_low_s8(b)), vmovl_high_s8(b));
        [
            vmovl_s16(vget_low_s16(low)),
            vmovl_high_s16(low),
            vmovl_s16(vget_low_s16(high)),
            vmovl_high_s16(high),
        ]
    }
}

/// An instruction of every aarch64 CPU that takes a register and makes one.
macro_rules! instruction {
    ($text:literal, $a:expr) => {{
        let out;
        asm!(
            $text,
            out = out(vreg) out,
            a = in(vreg) $a,
            options(pure, nomem, nostack, preserves_flags),
        );
        out
    }};
}

/// Eight f16 as floats.
#[inline(always)]
unsafe fn from_f16(h: uint16x8_t) -> [float32x4_t; 2] {
    unsafe {
        [
            instruction!("fcvtl {out:v}.4s, {a:v}.4h", h),
            instruction!("fcvtl2 {out:v}.4s, {a:v}.8h", h),
        ]
    }
}

/// Four floats as f16, clamped.
#[inline(always)]
unsafe fn to_f16(a: float32x4_t) -> uint16x4_t {
    unsafe {
        // NaN comes through both.
        let a = vminq_f32(a, vdupq_n_f32(65504.0));
        let a = vmaxq_f32(a, vdupq_n_f32(-65504.0));
        instruction!("fcvtn {out:v}.4h, {a:v}.4s", a)
    }
}

/// Four floats as bf16, to nearest even.
#[inline(always)]
unsafe fn to_bf16(a: float32x4_t) -> uint16x4_t {
    unsafe {
        let bits = vreinterpretq_u32_f32(a);
        let odd = vandq_u32(vshrq_n_u32::<16>(bits), vdupq_n_u32(1));
        let rounded = vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
        // Rounding could carry a NaN over into a number.
        let quiet = vorr_u16(vshrn_n_u32::<16>(bits), vdup_n_u16(0x40));
        vbsl_u16(vmovn_u32(vceqq_f32(a, a)), rounded, quiet)
    }
}

/// The firsts and the seconds of four pairs of bf16 as floats.
#[inline(always)]
unsafe fn bf16_pairs(pairs: uint32x4_t) -> [float32x4_t; 2] {
    unsafe {
        let seconds = vandq_u32(pairs, vdupq_n_u32(0xFFFF_0000));
        [
            vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs)),
            vreinterpretq_f32_u32(seconds),
        ]
    }
}

/// See `elementwise::exp`.
#[inline(always)]
unsafe fn exp(a: float32x4_t) -> float32x4_t {
    unsafe {
        // NaN comes through both.
        let x = vmaxq_f32(a, vdupq_n_f32(EXP_LOW));
        let x = vminq_f32(x, vdupq_n_f32(EXP_HIGH));
        let n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(LOG2_E)));
        let r = vfmaq_f32(x, n, vdupq_n_f32(-LN2_HIGH));
        let r = vfmaq_f32(r, n, vdupq_n_f32(-LN2_LOW));
        let mut p = vdupq_n_f32(EXP_POLYNOMIAL[0]);
        for c in &EXP_POLYNOMIAL[1..] {
            p = vfmaq_f32(vdupq_n_f32(*c), p, r);
        }
        let p = vfmaq_f32(r, p, vmulq_f32(r, r));
        let p = vaddq_f32(p, vdupq_n_f32(1.0));
        let n = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
        vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32::<23>(n)))
    }
}

/// See `elementwise::exp2`.
#[inline(always)]
unsafe fn exp2(a: float32x4_t) -> float32x4_t {
    unsafe {
        let x = vmaxq_f32(a, vdupq_n_f32(EXP2_LOW));
        let n = vrndnq_f32(x);
        let r = vsubq_f32(x, n);
        let mut p = vdupq_n_f32(EXP2_POLYNOMIAL[0]);
        for c in &EXP2_POLYNOMIAL[1..] {
            p = vfmaq_f32(vdupq_n_f32(*c), p, r);
        }
        let n = vshlq_n_s32::<23>(vcvtq_s32_f32(n));
        vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), n))
    }
}

#[inline(always)]
unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    unsafe {
        // `fmax` would give the NaN where one is.
        vbslq_f32(vcgtq_f32(b, a), b, a)
    }
}

#[inline(always)]
unsafe fn keep_unequal(value: float32x4_t, equal: uint32x4_t) -> float32x4_t {
    unsafe { vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(value), equal)) }
}

#[inline(always)]
unsafe fn e8m0(e: uint32x4_t) -> float32x4_t {
    unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<23>(e)) }
}

// SAFETY of all of it: the contract of `Simd`; `Isa::detect` hands these types out only where the features were detected.
impl<D: Dot> Simd for Neon<D> {
    type I = [uint8x16_t; 4];
    type S = [int32x4_t; 4];
    type F = [float32x4_t; 4];
    const ROWS: usize = 4;
    const MANY_ROWS: usize = D::MANY_ROWS;
    const MANY_TILES: usize = 1;
    const QUERIES: usize = 6;
    const SUMS: usize = 4;
    const CENTRED: bool = D::CENTRED;

    #[inline(always)]
    unsafe fn load(p: *const u8) -> Self::I {
        unsafe {
            [
                vld1q_u8(p),
                vld1q_u8(p.add(16)),
                vld1q_u8(p.add(32)),
                vld1q_u8(p.add(48)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn and(a: Self::I, mask: u8) -> Self::I {
        unsafe {
            let m = [vdupq_n_u8(mask); 4];
            four!(vandq_u8, a, m)
        }
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        unsafe { four!(vorrq_u8, a, b) }
    }
    #[inline(always)]
    unsafe fn shr_mask<const N: u32>(a: Self::I, mask: u8) -> Self::I {
        unsafe { Self::and(shift!(vshrq_n_u8, N, a), mask) }
    }
    #[inline(always)]
    unsafe fn shl_mask<const N: u32>(a: Self::I, mask: u8) -> Self::I {
        unsafe { Self::and(shift!(vshlq_n_u8, N, a), mask) }
    }
    #[inline(always)]
    unsafe fn lookup(a: Self::I, table: &[u8; 16]) -> Self::I {
        unsafe {
            let t = [vld1q_u8(table.as_ptr()); 4];
            four!(vqtbl1q_u8, t, a)
        }
    }
    #[inline(always)]
    unsafe fn store_codes(p: *mut u8, a: Self::I) {
        unsafe {
            vst1q_u8(p, a[0]);
            vst1q_u8(p.add(16), a[1]);
            vst1q_u8(p.add(32), a[2]);
            vst1q_u8(p.add(48), a[3]);
        }
    }
    #[inline(always)]
    unsafe fn sums_zero() -> Self::S {
        unsafe { [vdupq_n_s32(0); 4] }
    }
    #[inline(always)]
    unsafe fn sums_splat(x: i32) -> Self::S {
        unsafe { [vdupq_n_s32(x); 4] }
    }
    #[inline(always)]
    unsafe fn sums_add(a: Self::S, b: Self::S) -> Self::S {
        unsafe { four!(vaddq_s32, a, b) }
    }
    #[inline(always)]
    unsafe fn sums_shl(a: Self::S, n: u32) -> Self::S {
        unsafe { Self::sums_shift(a, n as i32) }
    }
    #[inline(always)]
    unsafe fn sums_shift(a: Self::S, n: i32) -> Self::S {
        unsafe {
            let n = [vdupq_n_s32(n); 4];
            four!(vshlq_s32, a, n)
        }
    }
    #[inline(always)]
    unsafe fn dot4<const SMALL: bool>(sum: Self::S, codes: Self::I, x: *const i8) -> Self::S {
        unsafe {
            let x = vdupq_n_s32(x.cast::<i32>().read_unaligned());
            let x = vreinterpretq_s8_s32(x);
            [
                D::dot4::<SMALL>(sum[0], codes[0], x),
                D::dot4::<SMALL>(sum[1], codes[1], x),
                D::dot4::<SMALL>(sum[2], codes[2], x),
                D::dot4::<SMALL>(sum[3], codes[3], x),
            ]
        }
    }
    #[inline(always)]
    unsafe fn to_f32(a: Self::S) -> Self::F {
        unsafe { four!(vcvtq_f32_s32, a) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        unsafe { four!(vmulq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        unsafe { four!(vaddq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe {
            [
                vfmaq_f32(c[0], a[0], b[0]),
                vfmaq_f32(c[1], a[1], b[1]),
                vfmaq_f32(c[2], a[2], b[2]),
                vfmaq_f32(c[3], a[3], b[3]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        unsafe { four!(vdivq_f32, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        unsafe { four!(max, a, b) }
    }
    #[inline(always)]
    unsafe fn abs(a: Self::F) -> Self::F {
        unsafe { four!(vabsq_f32, a) }
    }
    #[inline(always)]
    unsafe fn largest(a: Self::F) -> f32 {
        unsafe { vmaxvq_f32(vmaxq_f32(vmaxq_f32(a[0], a[1]), vmaxq_f32(a[2], a[3]))) }
    }
    #[inline(always)]
    unsafe fn sum(a: Self::F) -> f32 {
        unsafe {
            let a = vaddq_f32(vaddq_f32(a[0], a[2]), vaddq_f32(a[1], a[3]));
            vaddv_f32(vadd_f32(vget_low_f32(a), vget_high_f32(a)))
        }
    }
    #[inline(always)]
    unsafe fn exp(a: Self::F) -> Self::F {
        unsafe { four!(exp, a) }
    }
    #[inline(always)]
    unsafe fn keep_unequal(value: Self::F, a: Self::F, b: Self::F) -> Self::F {
        unsafe {
            let equal = four!(vceqq_f32, a, b);
            four!(keep_unequal, value, equal)
        }
    }
    #[inline(always)]
    unsafe fn store_i8(p: *mut i8, a: Self::F) -> i32 {
        unsafe {
            // NaN becomes 0.
            let codes = four!(vcvtnq_s32_f32, a);
            let low = vqmovn_high_s32(vqmovn_s32(codes[0]), codes[1]);
            let high = vqmovn_high_s32(vqmovn_s32(codes[2]), codes[3]);
            let codes = vqmovn_high_s16(vqmovn_s16(low), high);
            vst1q_s8(p, codes);
            i32::from(vaddlvq_s8(codes))
        }
    }
    #[inline(always)]
    unsafe fn load_f32(p: *const f32) -> Self::F {
        unsafe {
            [
                vld1q_f32(p),
                vld1q_f32(p.add(4)),
                vld1q_f32(p.add(8)),
                vld1q_f32(p.add(12)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        unsafe {
            let [a, b] = from_f16(vld1q_u16(p));
            let [c, d] = from_f16(vld1q_u16(p.add(8)));
            [a, b, c, d]
        }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8, shift: u32, mask: u8) -> Self::F {
        unsafe {
            let b = vshlq_u8(vld1q_u8(p), vdupq_n_s8(-(shift as i8)));
            four!(vcvtq_f32_u32, widen_u8(vandq_u8(b, vdupq_n_u8(mask))))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> Self::F {
        unsafe { four!(vcvtq_f32_s32, widen_i8(vld1q_s8(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_e8m0(p: *const u8) -> Self::F {
        unsafe {
            let less = vqsubq_u8(vld1q_u8(p), vdupq_n_u8(1));
            four!(e8m0, widen_u8(less))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, a: Self::F) {
        unsafe {
            vst1q_f32(p, a[0]);
            vst1q_f32(p.add(4), a[1]);
            vst1q_f32(p.add(8), a[2]);
            vst1q_f32(p.add(12), a[3]);
        }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, a: Self::F) {
        unsafe {
            let h = four!(to_f16, a);
            vst1q_u16(p, vcombine_u16(h[0], h[1]));
            vst1q_u16(p.add(8), vcombine_u16(h[2], h[3]));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, a: Self::F) {
        unsafe {
            let h = four!(to_bf16, a);
            vst1q_u16(p, vcombine_u16(h[0], h[1]));
            vst1q_u16(p.add(8), vcombine_u16(h[2], h[3]));
        }
    }
    #[inline(always)]
    unsafe fn dot_bf16<const NATIVE: bool>(
        sum: Self::F,
        weights: Self::I,
        x: *const [u16; 2],
    ) -> Self::F {
        unsafe {
            let x = bf16_pairs(vdupq_n_u32(x.cast::<u32>().read_unaligned()));
            let w = four!(vreinterpretq_u32_u8, weights);
            let w = four!(bf16_pairs, w);
            [
                vfmaq_f32(vfmaq_f32(sum[0], w[0][1], x[1]), w[0][0], x[0]),
                vfmaq_f32(vfmaq_f32(sum[1], w[1][1], x[1]), w[1][0], x[0]),
                vfmaq_f32(vfmaq_f32(sum[2], w[2][1], x[1]), w[2][0], x[0]),
                vfmaq_f32(vfmaq_f32(sum[3], w[3][1], x[1]), w[3][0], x[0]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn exp2(a: Self::F) -> Self::F {
        unsafe { four!(exp2, a) }
    }
}
