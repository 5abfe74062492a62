//! What this machine can do at most: bytes read from memory and int8 operations per second. For benchmarks alone.

use std::hint::black_box;
use std::io;
use std::time::Instant;

use crate::mmap::Arena;
use crate::pool::Pool;
use crate::simd::{Isa, LANES, Set, Simd, dispatch};

/// Each figure is the best of so many tries: what disturbs a try can only make it slower.
const TRIES: usize = 7;
/// Bytes of one unit of reading: large beside what handing out a unit costs.
const UNIT: usize = 4 << 20;
/// Steps of one unit of multiplying: about 0.1 ms in a fast instruction set.
const STEPS: usize = 50_000;
/// Units of multiplying in one try, per thread.
const UNITS: usize = 200;
/// Multiplications and additions of one `dot4`.
const OPERATIONS: usize = LANES * 4 * 2;
/// Vectors that one unit of multiplying goes round: they stay in the nearest cache.
const CODES: usize = 16;
/// Independent sums that keep the multipliers busy: their latency times their number per cycle, and at most what the
/// registers hold (32 of 64 bytes, 16 of 32, or 32 of 16).
const SUMS_AVX512: usize = 12;
const SUMS: usize = 4;

/// What all threads reach together.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub threads: usize,
    /// The instruction set that was used, the best of this CPU that the kernels know.
    pub instruction_set: &'static str,
    /// Reading a buffer far larger than the caches, in order.
    pub read_bytes_per_second: f64,
    /// Exact products of unsigned with signed bytes, summed to 32 bits, in registers; a multiplication and an addition
    /// are two operations.
    pub int8_operations_per_second: f64,
}

/// Measure both with `threads` threads, reading `bytes` (at least one unit of 4 MiB), which should be many times the
/// last cache. Takes about as long as reading 8 times `bytes`, and 0.1 s more; seconds on a CPU without a fast path.
///
/// # Errors
/// When `bytes` cannot be allocated.
pub fn measure(threads: usize, bytes: usize) -> io::Result<Limits> {
    let pool = Pool::new(threads);
    let isa = Isa::detect();
    Ok(Limits {
        threads: pool.threads(),
        instruction_set: isa.name(),
        read_bytes_per_second: reading(&pool, isa, bytes)?,
        int8_operations_per_second: multiplying(&pool, isa),
    })
}

fn reading(pool: &Pool, isa: Isa, bytes: usize) -> io::Result<f64> {
    let bytes = bytes.max(UNIT) / UNIT * UNIT;
    // In large pages, as weights lie. Written, by the threads that will read it: untouched pages would all be one page of
    // zeros.
    let mut buffer = Arena::with_pieces(bytes).take(bytes)?;
    pool.rows(&mut buffer[..bytes], UNIT, |unit, part| {
        part.fill(unit as u8 | 1)
    });
    let seconds = best(|| {
        pool.run(bytes / UNIT, |unit| {
            let mut out = [0.0; LANES];
            // SAFETY: `isa` was detected.
            unsafe { read_all(isa, &buffer[unit * UNIT..][..UNIT], &mut out) };
            black_box(out);
        });
    });
    Ok(bytes as f64 / seconds)
}

fn multiplying(pool: &Pool, isa: Isa) -> f64 {
    // Small, so that no sum overflows; hidden from the compiler, so that it works nothing out beforehand.
    let codes = black_box([[1u8; LANES * 4]; CODES]);
    let x = black_box([[1i8; 4]; SUMS_AVX512]);
    let (wide, slow) = (
        matches!(isa.0, Set::Avx512 | Set::Avx512Bf16),
        isa == Isa::SCALAR,
    );
    let sums = if wide { SUMS_AVX512 } else { SUMS };
    let units = pool.threads() * if slow { UNITS / 20 } else { UNITS };
    let seconds = best(|| {
        pool.run(units, |_| {
            let mut out = [0.0; LANES];
            // SAFETY: `isa` was detected; both arrays are longer than what is read of them.
            unsafe {
                if wide {
                    multiply::<SUMS_AVX512>(isa, &codes, &x, &mut out)
                } else {
                    multiply::<SUMS>(isa, &codes, &x, &mut out)
                }
            };
            black_box(out);
        });
    });
    (units * STEPS * sums * OPERATIONS) as f64 / seconds
}

/// Seconds of the quickest of some tries.
fn best(mut work: impl FnMut()) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..TRIES {
        let start = Instant::now();
        work();
        least = least.min(start.elapsed().as_secs_f64());
    }
    least
}

dispatch! {
    /// Read all of `bytes`, whole vectors of it.
    unsafe fn read_all<>(bytes: &[u8], out: &mut [f32; LANES]) = read_body
}

#[inline(always)]
unsafe fn read_body<S: Simd>(bytes: &[u8], out: &mut [f32; LANES]) {
    const WIDTH: usize = LANES * 4;
    // SAFETY: the trait's contract holds by the caller's `isa`; every read is inside a chunk of four vectors.
    unsafe {
        let [mut a, mut b, mut c, mut d] = [S::load([0; WIDTH].as_ptr()); 4];
        for chunk in bytes.chunks_exact(4 * WIDTH) {
            a = S::or(a, S::load(chunk.as_ptr()));
            b = S::or(b, S::load(chunk.as_ptr().add(WIDTH)));
            c = S::or(c, S::load(chunk.as_ptr().add(2 * WIDTH)));
            d = S::or(d, S::load(chunk.as_ptr().add(3 * WIDTH)));
        }
        let all = S::or(S::or(a, b), S::or(c, d));
        let sum = S::dot4::<true>(S::sums_zero(), all, [1i8; 4].as_ptr());
        S::store(out.as_mut_ptr(), S::to_f32(sum));
    }
}

dispatch! {
    /// `STEPS` times `N` products of sixteen lanes. All lengths are constants, so that the sums stay in registers.
    unsafe fn multiply<; const N: usize>(codes: &[[u8; LANES * 4]; CODES], x: &[[i8; 4]; SUMS_AVX512], out: &mut [f32; LANES]) = multiply_body
}

#[inline(always)]
unsafe fn multiply_body<S: Simd, const N: usize>(
    codes: &[[u8; LANES * 4]; CODES],
    x: &[[i8; 4]; SUMS_AVX512],
    out: &mut [f32; LANES],
) {
    // SAFETY: the trait's contract holds by the caller's `isa`; slices bound every pointer.
    unsafe {
        let mut sums = [S::sums_zero(); N];
        for step in 0..STEPS {
            let code = S::load(codes[step % CODES].as_ptr());
            for k in 0..N {
                sums[k] = S::dot4::<true>(sums[k], code, x[k].as_ptr());
            }
        }
        let mut all = S::to_f32(sums[0]);
        for sum in &sums[1..] {
            all = S::add(all, S::to_f32(*sum));
        }
        S::store(out.as_mut_ptr(), all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_does_the_work_that_is_counted() {
        let codes = [[1u8; LANES * 4]; CODES];
        for isa in Isa::available() {
            let mut out = [0.0; LANES];
            // SAFETY: `isa` is available.
            unsafe { multiply::<SUMS>(isa, &codes, &[[1; 4]; SUMS_AVX512], &mut out) };
            let operations = out.iter().sum::<f32>() * 2.0;
            assert_eq!(operations, (STEPS * SUMS * OPERATIONS) as f32, "{isa:?}");

            let mut bytes = vec![0u8; 4096];
            bytes[4095] = 2; // the last of them: all were looked at
            unsafe { read_all(isa, &bytes, &mut out) };
            assert_eq!(out.iter().sum::<f32>(), 2.0, "{isa:?}");
        }
    }

    #[test]
    fn what_cannot_be_allocated_is_an_error() {
        assert!(measure(1, usize::MAX / 2).is_err());
        let limits = measure(2, 0).expect("4 MiB are there");
        assert!(limits.read_bytes_per_second > 0.0 && limits.int8_operations_per_second > 0.0);
    }
}
