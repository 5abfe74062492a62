//! A tensor's numbers in another type, row by row, so that nobody holds them twice.

use hfcore_kernels::pool::Pool;
use hfcore_kernels::quant::{TensorType, dequantize};
use hfcore_kernels::quantize::{nest, quantize};

use crate::error::{Error, Result};
use crate::weights::{Target, Tensor};

/// Numbers that a block of NF4 and FP4 has, and where its largest lies.
const NESTED: usize = 64;
const MAXIMUM: usize = 4;

/// A tensor on its way to another type.
pub struct Conversion<'a> {
    from: Tensor<'a>,
    to: TensorType,
    row_bytes: usize,
    /// What takes the place of the blocks' largest numbers.
    maxima: Option<Vec<f32>>,
}

impl<'a> Conversion<'a> {
    /// Look at the whole tensor first, where its target wants it.
    ///
    /// # Errors
    /// [`Error::ModelFile`] where rows of it are no whole number of blocks.
    pub fn new(pool: &Pool, from: Tensor<'a>, target: Target) -> Result<Self> {
        let (to, cols) = (target.tensor_type, from.cols());
        let row_bytes = to.row_bytes(cols).filter(|n| *n > 0);
        let row_bytes = row_bytes.ok_or_else(|| Error::ModelFile {
            path: from.name.to_owned(),
            problem: format!("rows of {cols} numbers are no blocks of {}", to.name()),
        })?;
        let nested = target.nested && matches!(to, TensorType::NF4 | TensorType::FP4);
        Ok(Self {
            from,
            to,
            row_bytes,
            maxima: nested.then(|| maxima(pool, &from)),
        })
    }

    /// Write row `i` as blocks. `importance`: how much an error of each of its numbers counts.
    ///
    /// # Panics
    /// Where there is no such row, or a length is another: a defect of the caller.
    pub fn row(&self, i: usize, importance: Option<&[f32]>, out: &mut [u8]) {
        let mut numbers = vec![0.0; self.from.cols()];
        dequantize(self.from.tensor_type, self.from.row(i), &mut numbers);
        quantize(self.to, &numbers, importance, out);
        if let Some(maxima) = &self.maxima {
            let blocks = numbers.len() / NESTED;
            let own = &maxima[i * blocks..(i + 1) * blocks];
            for (block, most) in out.chunks_exact_mut(self.to.block_bytes()).zip(own) {
                block[..MAXIMUM].copy_from_slice(&most.to_le_bytes());
            }
        }
    }

    /// The blocks of all rows, one after the other. `importance`: of a row, see [`Self::row`].
    pub fn blocks<'i>(
        &self,
        pool: &Pool,
        importance: impl Fn(usize) -> Option<&'i [f32]> + Sync,
    ) -> Vec<u8> {
        let mut out = vec![0; self.from.rows() * self.row_bytes];
        pool.rows(&mut out, self.row_bytes, |i, out| {
            self.row(i, importance(i), out);
        });
        out
    }

    /// All numbers as they are after it.
    pub fn numbers(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.from.elements()];
        let mut blocks = vec![0; self.row_bytes];
        for (i, out) in out.chunks_exact_mut(self.from.cols().max(1)).enumerate() {
            self.row(i, None, &mut blocks);
            dequantize(self.to, &blocks, out);
        }
        out
    }
}

/// The largest number of each block of a tensor, quantised together with those of the whole that it is a part of, and back.
fn maxima(pool: &Pool, tensor: &Tensor) -> Vec<f32> {
    let (cols, blocks) = (tensor.cols(), tensor.cols() / NESTED);
    let row = tensor.data.len() / tensor.rows().max(1);
    let (whole, first) = tensor.outer.unwrap_or((tensor.data, 0));
    let mut all = vec![0.0f32; whole.len() / row.max(1) * blocks];
    pool.rows(&mut all, blocks, |i, out| {
        let mut numbers = vec![0.0; cols];
        dequantize(
            tensor.tensor_type,
            &whole[i * row..(i + 1) * row],
            &mut numbers,
        );
        for (out, block) in out.iter_mut().zip(numbers.chunks_exact(NESTED)) {
            *out = block.iter().fold(0.0, |most, x| most.max(x.abs()));
        }
    });
    nest(&mut all);
    all.drain(first * blocks..(first + tensor.rows()) * blocks)
        .collect()
}
