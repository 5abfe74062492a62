//! hfcore's kernels: slices in, slices out. The only crate with unsafe code.

pub mod mmap;
pub mod quant;
