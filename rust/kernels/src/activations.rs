//! Activations as multiplications read them: floats, and the same quantised to 8 bits as the weights they meet want it.

use crate::pool::Pool;
use crate::quant::TensorType;
use crate::simd::{Isa, LANES, Simd, dispatch};
use crate::tile::BLOCK;

/// 32 activations of a row, quantised to 8 bits.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ActBlock {
    pub codes: [i8; BLOCK],
    pub scale: f32,
    /// The sum of the codes; times the scale where it is the block's own (`Scales::Block`).
    pub sum: f32,
    /// Minus the sum of the first half of the codes, and of the second.
    pub negated_sums: [i32; 2],
}

/// How many activations share a scale: as many as the weights they meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// 32, one block.
    Block,
    /// 256, for the K-quants: eight blocks with the same scale.
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

dispatch! {
    pub(crate) unsafe fn quantize_blocks<>(x: &[f32], scales: Scales, out: &mut [ActBlock]) = quantize_body
}

#[inline(always)]
unsafe fn quantize_body<S: Simd>(x: &[f32], scales: Scales, out: &mut [ActBlock]) {
    let together = scales.blocks();
    for (i, out) in out.chunks_exact_mut(together).enumerate() {
        let x = &x[i * together * BLOCK..][..together * BLOCK];
        // SAFETY: a block is two vectors of floats, and of codes.
        unsafe {
            // From zero up, and `x` second: a NaN counts for nothing.
            let mut max = S::splat(0.0);
            for at in (0..x.len()).step_by(LANES) {
                max = S::max(max, S::abs(S::load_f32(x.as_ptr().add(at))));
            }
            let max = S::largest(max);
            let scale = max / 127.0;
            let inverse = S::splat(if scale > 0.0 { 1.0 / scale } else { 0.0 });
            for j in 0..together {
                let (x, out) = (x.as_ptr().add(j * BLOCK), &mut out[j]);
                let codes = out.codes.as_mut_ptr();
                let first = S::store_i8(codes, S::mul(S::load_f32(x), inverse));
                let x = S::load_f32(x.add(LANES));
                let second = S::store_i8(codes.add(LANES), S::mul(x, inverse));
                out.scale = scale;
                out.negated_sums = [-first, -second];
                out.sum = (first + second) as f32;
                if together == 1 {
                    out.sum *= scale;
                }
            }
        }
    }
}

/// The rows of activations that a multiplication reads.
#[derive(Clone, Copy)]
pub struct Activations<'a> {
    pub rows: usize,
    /// `[rows][inputs]`, for float weights.
    pub floats: &'a [f32],
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
        assert_eq!(out, [ActBlock::default()]);
    }
}
