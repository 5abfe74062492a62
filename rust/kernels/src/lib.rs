//! hfcore's kernels: slices in, slices out. The only crate with unsafe code.
//!
//! Everything is written once, generic over [`simd::Simd`], and compiled for each instruction set; the best one of this
//! CPU is found at run time. [`scalar`] is the readable definition and the path for CPUs without a fast twin.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod activations;
pub mod attention;
pub mod elementwise;
mod iq;
mod iq_grids;
pub mod kv;
pub mod limits;
pub mod matmul;
pub mod mmap;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod pool;
pub mod quant;
pub mod quantize;
mod scalar;
pub mod simd;
mod spread;
pub mod tile;
