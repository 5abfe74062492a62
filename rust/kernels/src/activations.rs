//! Activations as multiplications read them: floats, and the same quantised to 8 bits as the weights they meet want it.

use crate::pool::Pool;
use crate::quant::TensorType;
use crate::simd::{Isa, LANES, Simd, dispatch, load_part};
use crate::tile::BLOCK;

/// 32 activations of a row, quantised to 8 bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ActBlock {
    pub codes: [i8; BLOCK],
    /// What a code stands for, after the shift: the same for all that `Scales` says.
    pub scale: f32,
    /// The sum of the codes, shifted.
    pub sum: f32,
    /// Minus the sum of the first half of the codes, and of the second.
    pub negated_sums: [i32; 2],
    /// A code counts 2 to the `shift` times.
    pub shift: i32,
}

/// The largest shift: the largest sum of products (of Q8_0: 128 x 127 x 32) stays below 2 to the 31.
const SHIFT: i32 = 11;

/// How activations share a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// Each block has its own, which is a power of two times the row's: integers are shifted where floats would be
    /// multiplied, beside the multiplications.
    Block,
    /// 256 share one, for the K-quants: eight blocks.
    Super,
}

impl Scales {
    pub(crate) fn blocks(self) -> usize {
        match self {
            Self::Block => 1,
            Self::Super => 8,
        }
    }

    /// What a type of weights wants; floats want no quantised activations.
    pub(crate) fn of(tensor_type: TensorType) -> Option<Self> {
        match tensor_type.block_len() {
            1 => None,
            256 => Some(Self::Super),
            _ => Some(Self::Block),
        }
    }
}

/// Quantise rows of `width` activations; `out` is `[rows][width / 32]`.
///
/// # Panics
/// When `width` is not a multiple of what shares a scale, or the lengths do not agree.
pub fn quantize_rows(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    width: usize,
    scales: Scales,
    out: &mut [ActBlock],
) {
    assert!(
        width.is_multiple_of(BLOCK * scales.blocks()) && x.len() == out.len() * BLOCK,
        "activations in rows of {width}"
    );
    let blocks = width / BLOCK;
    let quantize = |row: usize, out: &mut [ActBlock]| {
        // SAFETY: slices; `isa` was detected.
        unsafe { quantize_blocks(isa, &x[row * width..(row + 1) * width], scales, out) }
    };
    if out.len() < 512 {
        out.chunks_exact_mut(blocks)
            .enumerate()
            .for_each(|(row, out)| quantize(row, out));
    } else {
        pool.rows(out, blocks, quantize);
    }
}

/// Round rows of `width` activations to bf16; `out` is `[rows][width / 2]`, an odd width filled up with 0. `split`: each pair is
/// followed by what was rounded off, in bf16.
///
/// # Panics
/// When the lengths do not agree.
pub fn round_rows(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    width: usize,
    split: bool,
    out: &mut [[u16; 2]],
) {
    let pairs = width.div_ceil(2) * if split { 2 } else { 1 };
    assert_eq!(
        x.len() * pairs,
        out.len() * width,
        "activations in rows of {width}"
    );
    let round = |row: usize, out: &mut [[u16; 2]]| {
        // SAFETY: slices; `isa` was detected.
        unsafe { round_row(isa, &x[row * width..(row + 1) * width], split, out) }
    };
    if out.len() < 8192 {
        out.chunks_exact_mut(pairs.max(1))
            .enumerate()
            .for_each(|(row, out)| round(row, out));
    } else {
        pool.rows(out, pairs, round);
    }
}

dispatch! {
    unsafe fn round_row<>(x: &[f32], split: bool, out: &mut [[u16; 2]]) = round_body
}

#[inline(always)]
unsafe fn round_body<S: Simd>(x: &[f32], split: bool, out: &mut [[u16; 2]]) {
    // SAFETY: sixteen numbers are eight pairs, of `out` or of a copy.
    unsafe {
        if split {
            for (i, out) in out.chunks_mut(LANES).enumerate() {
                split_body::<S>(load_part::<S>(x, i * LANES), out);
            }
            return;
        }
        for (i, out) in out.chunks_mut(LANES / 2).enumerate() {
            let x = load_part::<S>(x, i * LANES);
            if out.len() == LANES / 2 {
                S::store_bf16(out.as_mut_ptr().cast(), x);
                continue;
            }
            let mut part = [[0; 2]; LANES / 2];
            S::store_bf16(part.as_mut_ptr().cast(), x);
            out.copy_from_slice(&part[..out.len()]);
        }
    }
}

/// Sixteen numbers as pairs, each followed by what its rounding left: what is not finite leaves nothing.
#[inline(always)]
unsafe fn split_body<S: Simd>(x: S::F, out: &mut [[u16; 2]]) {
    // SAFETY: sixteen numbers, in arrays of as many.
    unsafe {
        let (mut numbers, mut rounded, mut rest) = ([0f32; LANES], [0u16; LANES], [0u16; LANES]);
        S::store(numbers.as_mut_ptr(), x);
        S::store_bf16(rounded.as_mut_ptr(), x);
        for (number, rounded) in numbers.iter_mut().zip(&rounded) {
            let left = *number - f32::from_bits(u32::from(*rounded) << 16);
            *number = if left.is_finite() { left } else { 0.0 };
        }
        S::store_bf16(rest.as_mut_ptr(), S::load_f32(numbers.as_ptr()));
        for (i, out) in out.chunks_exact_mut(2).enumerate() {
            out[0] = [rounded[2 * i], rounded[2 * i + 1]];
            out[1] = [rest[2 * i], rest[2 * i + 1]];
        }
    }
}

dispatch! {
    pub(crate) unsafe fn quantize_blocks<>(x: &[f32], scales: Scales, out: &mut [ActBlock]) = quantize_body
}

#[inline(always)]
unsafe fn quantize_body<S: Simd>(x: &[f32], scales: Scales, out: &mut [ActBlock]) {
    // SAFETY: a block is two vectors of floats, and of codes.
    unsafe {
        match scales {
            Scales::Block => quantize_shifted::<S>(x, out),
            Scales::Super => {
                for (x, out) in x.chunks_exact(8 * BLOCK).zip(out.chunks_exact_mut(8)) {
                    let mut max = S::splat(0.0);
                    for at in (0..x.len()).step_by(LANES) {
                        max = S::max(max, S::abs(S::load_f32(x.as_ptr().add(at))));
                    }
                    let (scale, inverse) = scale_of(S::largest(max));
                    for (j, out) in out.iter_mut().enumerate() {
                        quantize_block::<S>(x.as_ptr().add(j * BLOCK), inverse, out);
                        (out.scale, out.shift) = (scale, 0);
                    }
                }
            }
        }
    }
}

/// A row whose blocks have scales that differ by powers of two.
#[inline(always)]
unsafe fn quantize_shifted<S: Simd>(x: &[f32], out: &mut [ActBlock]) {
    unsafe {
        let mut largest = 0f32;
        for (j, out) in out.iter_mut().enumerate() {
            let x = x.as_ptr().add(j * BLOCK);
            // From zero up, and `x` second: a NaN counts for nothing.
            let max = S::max(S::splat(0.0), S::abs(S::load_f32(x)));
            out.scale = S::largest(S::max(max, S::abs(S::load_f32(x.add(LANES)))));
            largest = if out.scale > largest {
                out.scale
            } else {
                largest
            };
        }
        let (scale, inverse) = scale_of(largest);
        let scale = scale / (1 << SHIFT) as f32;
        for (j, out) in out.iter_mut().enumerate() {
            // How often the block's largest can be doubled: the bits of positive floats are in their order.
            let below = (largest.to_bits() - out.scale.to_bits()) >> 23;
            let doubled = (below as i32).min(SHIFT);
            let power = f32::from_bits(((127 + doubled) as u32) << 23);
            quantize_block::<S>(x.as_ptr().add(j * BLOCK), inverse * power, out);
            out.shift = SHIFT - doubled;
            out.sum *= (1 << out.shift) as f32;
            out.scale = scale;
        }
    }
}

/// What a code stands for where `max` is the largest number, and one by that. What is smaller than any activation is 0.
fn scale_of(max: f32) -> (f32, f32) {
    let scale = max / 127.0;
    match scale > 1e-30 {
        true => (scale, 1.0 / scale),
        false => (0.0, 0.0),
    }
}

/// Codes of the block at `x`, and their sums.
#[inline(always)]
unsafe fn quantize_block<S: Simd>(x: *const f32, inverse: f32, out: &mut ActBlock) {
    unsafe {
        let (codes, inverse) = (out.codes.as_mut_ptr(), S::splat(inverse));
        let first = S::store_i8(codes, S::mul(S::load_f32(x), inverse));
        let x = S::load_f32(x.add(LANES));
        let second = S::store_i8(codes.add(LANES), S::mul(x, inverse));
        out.negated_sums = [-first, -second];
        out.sum = (first + second) as f32;
    }
}

/// The rows of activations that a multiplication reads.
#[derive(Clone, Copy)]
pub struct Activations<'a> {
    pub rows: usize,
    /// `[rows][inputs]`, for weights in F32 and F16.
    pub floats: &'a [f32],
    /// `[rows][inputs / 2]`, rounded to bf16, for weights in BF16; an odd last input is beside a 0. Of a matrix that
    /// splits them, `[rows][inputs / 2][2]`: what was rounded off as well. Empty where no part needs them.
    pub pairs: &'a [[u16; 2]],
    /// `[rows][inputs / 32]`, for weights quantised in blocks and in super-blocks; empty where no part needs them.
    pub blocks: &'a [ActBlock],
    pub supers: &'a [ActBlock],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silent_activations_quantise_to_zero() {
        let mut out = [ActBlock {
            scale: 1.0,
            ..Default::default()
        }];
        quantize_rows(
            Isa::detect(),
            &Pool::new(1),
            &[0.0; 32],
            32,
            Scales::Block,
            &mut out,
        );
        let silent = ActBlock {
            shift: out[0].shift,
            ..Default::default()
        };
        assert_eq!(out, [silent]);
    }

    #[test]
    fn rounding_to_bf16_is_to_nearest_even_on_every_set() {
        let mut x = vec![
            f32::NAN,
            f32::from_bits(0x7F80_0001),
            f32::from_bits(0xFFFF_FFFF),
            f32::INFINITY,
            f32::MAX,
            f32::MIN,
            -0.0,
            1e-40,
        ];
        // Halves of the last place, and their neighbours, beside even and odd numbers.
        for bits in [0x3F80_0000u32, 0x3F81_0000, 0xC2FF_0000, 0x0001_0000] {
            x.extend([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|b| f32::from_bits(bits | b)));
        }
        for width in [1, 2, 15, 16, 17, 31, 32] {
            let want: Vec<[u16; 2]> = (x[..width].chunks(2))
                .map(|x| [0, 1].map(|i| x.get(i).map_or(0, |&x| half::bf16::from_f32(x).to_bits())))
                .collect();
            for isa in Isa::available() {
                let mut out = vec![[7; 2]; want.len()];
                round_rows(isa, &Pool::new(1), &x[..width], width, false, &mut out);
                assert_eq!(out, want, "{width} on {}", isa.name());
            }
        }
        let pair = |x: f32| {
            let mut out = [[0; 2]];
            round_rows(Isa::detect(), &Pool::new(1), &[x], 1, false, &mut out);
            f32::from_bits(u32::from(out[0][0]) << 16)
        };
        assert_eq!(pair(1.0 + 1.0 / 256.0), 1.0);
        assert_eq!(pair(1.0 + 3.0 / 256.0), 1.0 + 2.0 / 128.0);
        assert!(pair(f32::NAN).is_nan());
    }

    #[test]
    fn what_rounding_to_bf16_leaves_is_kept_beside_it() {
        let x = [1.2345678f32, -3.0e-3, 7.7e8, f32::INFINITY, -0.0];
        for isa in Isa::available() {
            let mut out = vec![[7; 2]; 6];
            round_rows(isa, &Pool::new(1), &x, x.len(), true, &mut out);
            let number = |bits: u16| f32::from_bits(u32::from(bits) << 16);
            for (i, x) in x.iter().enumerate() {
                let [whole, rest] = [0, 1].map(|part| number(out[i / 2 * 2 + part][i % 2]));
                let near = (whole + rest - x).abs() <= x.abs() / 65536.0;
                assert!(
                    near || whole == *x,
                    "{x} on {}: {whole} + {rest}",
                    isa.name()
                );
            }
            assert_eq!([out[4][1], out[5][1]], [0, 0], "an odd width is filled up");
        }
    }
}
