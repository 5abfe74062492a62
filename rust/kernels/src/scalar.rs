//! Sixteen lanes without SIMD: the definition of every vector operation, and the path for CPUs that have no fast twin.

use crate::elementwise::{exp, exp2};
use crate::quant::{bf16_to_f32, f16_to_f32};
use crate::simd::{LANES, Simd};

/// Plain arrays. Compiled for the baseline CPU; every fast twin gives the same bits.
#[derive(Clone, Copy)]
pub(crate) struct Scalar;

fn lanes<T: Copy + Default>(f: impl Fn(usize) -> T) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    for (i, o) in out.iter_mut().enumerate() {
        *o = f(i);
    }
    out
}

fn bytes(f: impl Fn(usize) -> u8) -> [u8; 64] {
    let mut out = [0; 64];
    for (i, o) in out.iter_mut().enumerate() {
        *o = f(i);
    }
    out
}

// SAFETY of the pointer reads below: the trait's contract, sixteen readable elements at `p`.
impl Simd for Scalar {
    type I = [u8; 64];
    type S = [i32; LANES];
    type F = [f32; LANES];
    const ROWS: usize = 1;
    const MANY_ROWS: usize = 1;
    const MANY_TILES: usize = 1;
    const QUERIES: usize = 1;
    const SUMS: usize = 4;

    unsafe fn load(p: *const u8) -> Self::I {
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    unsafe fn and(a: Self::I, mask: u8) -> Self::I {
        bytes(|i| a[i] & mask)
    }
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        bytes(|i| a[i] | b[i])
    }
    unsafe fn shr_mask<const N: u32>(a: Self::I, mask: u8) -> Self::I {
        bytes(|i| (a[i] >> N) & mask)
    }
    unsafe fn shl_mask<const N: u32>(a: Self::I, mask: u8) -> Self::I {
        bytes(|i| (a[i] << N) & mask)
    }
    unsafe fn lookup(a: Self::I, table: &[u8; 16]) -> Self::I {
        bytes(|i| table[usize::from(a[i] & 15)])
    }
    unsafe fn store_codes(p: *mut u8, a: Self::I) {
        unsafe { p.cast::<[u8; 64]>().write_unaligned(a) }
    }
    unsafe fn sums_zero() -> Self::S {
        [0; LANES]
    }
    unsafe fn sums_splat(x: i32) -> Self::S {
        [x; LANES]
    }
    unsafe fn sums_add(a: Self::S, b: Self::S) -> Self::S {
        lanes(|i| a[i] + b[i])
    }
    unsafe fn sums_shl(a: Self::S, n: u32) -> Self::S {
        lanes(|i| a[i] << n)
    }
    unsafe fn sums_shift(a: Self::S, n: i32) -> Self::S {
        lanes(|i| a[i] << n)
    }
    unsafe fn dot4<const SMALL: bool>(sum: Self::S, codes: Self::I, x: *const i8) -> Self::S {
        let x = unsafe { x.cast::<[i8; 4]>().read_unaligned() };
        lanes(|i| {
            sum[i]
                + (0..4)
                    .map(|j| i32::from(codes[4 * i + j]) * i32::from(x[j]))
                    .sum::<i32>()
        })
    }
    unsafe fn to_f32(a: Self::S) -> Self::F {
        lanes(|i| a[i] as f32)
    }
    unsafe fn splat(x: f32) -> Self::F {
        [x; LANES]
    }
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] * b[i])
    }
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] + b[i])
    }
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        lanes(|i| a[i].mul_add(b[i], c[i]))
    }
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| a[i] / b[i])
    }
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if b[i] > a[i] { b[i] } else { a[i] })
    }
    unsafe fn abs(a: Self::F) -> Self::F {
        a.map(f32::abs)
    }
    unsafe fn largest(a: Self::F) -> f32 {
        a.iter()
            .fold(f32::NEG_INFINITY, |m, &x| if x > m { x } else { m })
    }
    unsafe fn sum(mut a: Self::F) -> f32 {
        for half in [8, 4, 2, 1] {
            for j in 0..half {
                a[j] += a[j + half];
            }
        }
        a[0]
    }
    unsafe fn exp(a: Self::F) -> Self::F {
        a.map(exp)
    }
    unsafe fn keep_unequal(value: Self::F, a: Self::F, b: Self::F) -> Self::F {
        lanes(|i| if a[i] == b[i] { 0.0 } else { value[i] })
    }
    unsafe fn store_i8(p: *mut i8, a: Self::F) -> i32 {
        let codes = a.map(|x| x.round_ties_even() as i8);
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(codes) };
        codes.iter().map(|x| i32::from(*x)).sum()
    }
    unsafe fn load_f32(p: *const f32) -> Self::F {
        unsafe { p.cast::<[f32; LANES]>().read_unaligned() }
    }
    unsafe fn load_f16(p: *const u16) -> Self::F {
        let h = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        lanes(|i| f16_to_f32(h[i]))
    }
    unsafe fn load_u8(p: *const u8, shift: u32, mask: u8) -> Self::F {
        let b = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        lanes(|i| f32::from((b[i] >> shift) & mask))
    }
    unsafe fn load_i8(p: *const u8) -> Self::F {
        let b = unsafe { p.cast::<[i8; LANES]>().read_unaligned() };
        lanes(|i| f32::from(b[i]))
    }
    unsafe fn load_e8m0(p: *const u8) -> Self::F {
        let b = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        lanes(|i| f32::from_bits(u32::from(b[i].max(1) - 1) << 23))
    }
    unsafe fn store(p: *mut f32, a: Self::F) {
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(a) }
    }
    unsafe fn store_f16(p: *mut u16, a: Self::F) {
        let bits = a.map(|x| {
            let x = if x > 65504.0 { 65504.0 } else { x };
            let x = if x < -65504.0 { -65504.0 } else { x };
            half::f16::from_f32(x).to_bits()
        });
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) }
    }
    unsafe fn store_bf16(p: *mut u16, a: Self::F) {
        let bits = a.map(|x| half::bf16::from_f32(x).to_bits());
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(bits) }
    }
    unsafe fn dot_bf16<const NATIVE: bool>(
        sum: Self::F,
        weights: Self::I,
        x: *const [u16; 2],
    ) -> Self::F {
        let x = unsafe { *x }.map(bf16_to_f32);
        lanes(|i| {
            let weight = |at| bf16_to_f32(u16::from_le_bytes([weights[at], weights[at + 1]]));
            let (first, second) = (weight(4 * i), weight(4 * i + 2));
            first.mul_add(x[0], second.mul_add(x[1], sum[i]))
        })
    }
    unsafe fn exp2(a: Self::F) -> Self::F {
        a.map(exp2)
    }
}
