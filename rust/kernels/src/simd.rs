//! The vector operations that kernels are written in: sixteen lanes, whatever the CPU. Picks the instruction set once.

use std::sync::OnceLock;

/// Rows of a tile, lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes of 4 bytes (`I`), of 32-bit sums (`S`) and of floats (`F`).
///
/// # Safety
/// Every method may only run on a CPU that has the implementor's features; `Isa::detect` guarantees it. Pointers must be
/// readable (writable) for the sixteen elements that the name says; alignment is not needed. Methods are
/// `#[inline(always)]` without `target_feature`, to be inlined into a caller that carries it: closures and trait
/// methods cannot carry it themselves.
pub(crate) trait Simd: Copy {
    type I: Copy;
    type S: Copy;
    type F: Copy;

    /// Rows of activations that a multiplication takes at once, at most: as many as its registers hold sums for.
    const ROWS: usize;
    /// The same where there are many rows: rows, and tiles that share the reading of a row.
    const MANY_ROWS: usize;
    const MANY_TILES: usize;
    /// Queries that attention takes at once, at most.
    const QUERIES: usize;
    /// Sums that attention keeps in registers, at most.
    const SUMS: usize;
    /// `dot4` takes 128, their zero point, off codes that are not `SMALL`, since signed bytes are what it multiplies.
    const CENTRED: bool = false;

    unsafe fn load(p: *const u8) -> Self::I;
    unsafe fn and(a: Self::I, mask: u8) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// `(a >> N) & mask`, byte by byte; `mask` must clear what a 16-bit shift drags in.
    unsafe fn shr_mask<const N: u32>(a: Self::I, mask: u8) -> Self::I;
    unsafe fn shl_mask<const N: u32>(a: Self::I, mask: u8) -> Self::I;
    /// `table[a & 15]`, byte by byte; `a` is below 16.
    unsafe fn lookup(a: Self::I, table: &[u8; 16]) -> Self::I;
    unsafe fn store_codes(p: *mut u8, a: Self::I);
    unsafe fn sums_zero() -> Self::S;
    unsafe fn sums_splat(x: i32) -> Self::S;
    unsafe fn sums_add(a: Self::S, b: Self::S) -> Self::S;
    /// Times 2 to the `n`, a constant.
    unsafe fn sums_shl(a: Self::S, n: u32) -> Self::S;
    /// The same for any `n`.
    unsafe fn sums_shift(a: Self::S, n: i32) -> Self::S;
    /// Per lane: `sum` + the dot product of its four unsigned codes with the four signed bytes at `x`. `SMALL` codes are
    /// at most 127; of others `CENTRED` takes 128 off.
    unsafe fn dot4<const SMALL: bool>(sum: Self::S, codes: Self::I, x: *const i8) -> Self::S;
    unsafe fn to_f32(a: Self::S) -> Self::F;
    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `b` where it is the larger, else `a`, also where one is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn abs(a: Self::F) -> Self::F;
    /// The largest of the sixteen, none of which is NaN.
    unsafe fn largest(a: Self::F) -> f32;
    /// The sum of the sixteen: eight of lanes `i` and `i + 8`, then four, two, one.
    unsafe fn sum(a: Self::F) -> f32;
    /// e to the `a`: see `elementwise::exp`, whose bits it gives.
    unsafe fn exp(a: Self::F) -> Self::F;
    /// `value` where `a` differs from `b`, or is NaN; else 0.
    unsafe fn keep_unequal(value: Self::F, a: Self::F, b: Self::F) -> Self::F;
    /// Store `a` as signed bytes, to nearest even, NaN as 0; their sum. `a` is within -127.5..127.5.
    unsafe fn store_i8(p: *mut i8, a: Self::F) -> i32;
    unsafe fn load_f32(p: *const f32) -> Self::F;
    unsafe fn load_f16(p: *const u16) -> Self::F;
    /// Sixteen bytes, `(b >> shift) & mask`, as floats.
    unsafe fn load_u8(p: *const u8, shift: u32, mask: u8) -> Self::F;
    unsafe fn load_i8(p: *const u8) -> Self::F;
    /// Half of the power of two that an e8m0 byte means (MXFP4's scale); the two denormal ones become 0.
    unsafe fn load_e8m0(p: *const u8) -> Self::F;
    unsafe fn store(p: *mut f32, a: Self::F);
    /// To f16 bits, to nearest even; beyond f16's range its largest number. NaN stays NaN.
    unsafe fn store_f16(p: *mut u16, a: Self::F);
    /// To bf16 bits, to nearest even; NaN stays NaN.
    unsafe fn store_bf16(p: *mut u16, a: Self::F);
    /// Per lane: its pair of bf16 `weights` times the pair at `x`, added to `sum` by two `fma`s, the second of the pair
    /// first: the order of `vdpbf16ps`, which `NATIVE` takes. That takes denormal numbers for 0; beside others they
    /// count for nothing anyway.
    unsafe fn dot_bf16<const NATIVE: bool>(
        sum: Self::F,
        weights: Self::I,
        x: *const [u16; 2],
    ) -> Self::F;
    /// 2 to the `a`, which is not above 0: see `elementwise::exp2`, whose bits it gives.
    unsafe fn exp2(a: Self::F) -> Self::F;
}

/// Sixteen floats of `x` from `at` on; beyond its end 0.
#[inline(always)]
pub(crate) unsafe fn load_part<S: Simd>(x: &[f32], at: usize) -> S::F {
    // SAFETY: sixteen floats of `x`, or of a copy.
    unsafe {
        if let Some(whole) = x.get(at..at + LANES) {
            return S::load_f32(whole.as_ptr());
        }
        let mut part = [0f32; LANES];
        let rest = &x[at..];
        part[..rest.len()].copy_from_slice(rest);
        S::load_f32(part.as_ptr())
    }
}

/// Store to `out` from `at` on, as far as it goes.
#[inline(always)]
pub(crate) unsafe fn store_part<S: Simd>(out: &mut [f32], at: usize, a: S::F) {
    // SAFETY: sixteen floats of `out`, or of a copy.
    unsafe {
        if let Some(whole) = out.get_mut(at..at + LANES) {
            return S::store(whole.as_mut_ptr(), a);
        }
        let mut part = [0f32; LANES];
        S::store(part.as_mut_ptr(), a);
        let rest = &mut out[at..];
        rest.copy_from_slice(&part[..rest.len()]);
    }
}

/// Ask for what will be read soon.
#[inline(always)]
pub(crate) fn prefetch<T>(all: &[T]) {
    for at in (0..std::mem::size_of_val(all)).step_by(64) {
        prefetch_line(all.as_ptr().cast::<u8>().wrapping_add(at));
    }
}

/// Ask for 64 bytes, which need not exist: nothing is read.
#[inline(always)]
pub(crate) fn prefetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above.
    unsafe {
        std::arch::asm!(
            "prfm pldl1keep, [{at}]",
            at = in(reg) at.addr(),
            options(nomem, nostack, preserves_flags),
        );
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// An instruction set that this CPU has: values come from [`Isa::detect`] and [`Isa::available`] alone, so that whoever
/// holds one may run what is compiled for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(pub(crate) Set);

/// The instruction sets that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(dead_code, reason = "no CPU has them all")]
pub(crate) enum Set {
    Scalar,
    /// AVX2 + FMA + F16C.
    Avx2,
    /// The same with 256-bit VNNI.
    AvxVnni,
    /// AVX-512 F/BW/VL/DQ + VNNI.
    Avx512,
    /// The same with BF16, which products of bf16 weights alone are compiled for.
    Avx512Bf16,
    /// Plain NEON.
    Neon,
    /// The same with dot products of four bytes.
    NeonDot,
    /// And with those of unsigned and signed bytes.
    NeonI8mm,
}

impl Isa {
    /// Plain code, on every CPU.
    pub const SCALAR: Self = Self(Set::Scalar);

    /// The best of this CPU, or the one that is [forced](Self::forced); found once.
    pub fn detect() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let forced = Self::forced().ok().flatten();
            let best = || Self::available().last().copied().unwrap_or(Self::SCALAR);
            forced.unwrap_or_else(best)
        })
    }

    /// The one that the environment variable `HFCORE_ISA` names, for comparisons.
    ///
    /// # Errors
    /// When this CPU does not have it: what was wanted and what came.
    pub fn forced() -> Result<Option<Self>, String> {
        let Ok(wanted) = std::env::var("HFCORE_ISA") else {
            return Ok(None);
        };
        let available = Self::available();
        match available.iter().find(|isa| isa.name() == wanted) {
            Some(isa) => Ok(Some(*isa)),
            None => {
                let names: Vec<_> = available.iter().map(|isa| isa.name()).collect();
                let names = names.join(", ");
                Err(format!(
                    "HFCORE_ISA must be one of this CPU's, {names}, got {wanted:?}"
                ))
            }
        }
    }

    /// All that this CPU can run, slowest first.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::SCALAR];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                all.push(Self(Set::Avx2));
            }
            if avx2 && is_x86_feature_detected!("avxvnni") {
                all.push(Self(Set::AvxVnni));
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni")
            {
                all.push(Self(Set::Avx512));
                if is_x86_feature_detected!("avx512bf16") {
                    all.push(Self(Set::Avx512Bf16));
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            use std::arch::is_aarch64_feature_detected;
            all.push(Self(Set::Neon));
            if is_aarch64_feature_detected!("dotprod") {
                all.push(Self(Set::NeonDot));
            }
            if is_aarch64_feature_detected!("i8mm") {
                all.push(Self(Set::NeonI8mm));
            }
        }
        all
    }

    /// Its name, as benchmarks report it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Set::Scalar => "scalar",
            Set::Avx2 => "avx2",
            Set::AvxVnni => "avxvnni",
            Set::Avx512 => "avx512vnni",
            Set::Avx512Bf16 => "avx512bf16",
            Set::Neon => "neon",
            Set::NeonDot => "dotprod",
            Set::NeonI8mm => "i8mm",
        }
    }
}

/// `dispatch!(isa, fn name<S>(args) -> T { body })` makes one function that runs `body` compiled for `isa`.
/// The body is generic over `S: Simd`.
macro_rules! dispatch {
    ($(#[$doc:meta])* $vis:vis unsafe fn $name:ident<$($g:ident $(: $bound:path)?),* $(; const $c:ident : $ct:ty)?>($($arg:ident : $ty:ty),* $(,)?) = $body:ident) => {
        $(#[$doc])*
        $vis unsafe fn $name<$($g $(: $bound)?,)* $(const $c: $ct)?>(isa: $crate::simd::Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
                unsafe fn avx512<$($g $(: $bound)?,)* $(const $c: $ct)?>($($arg: $ty),*) {
                    unsafe { $body::<$crate::avx512::Avx512, $($g,)* $($c)?>($($arg),*) }
                }
                #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
                unsafe fn avxvnni<$($g $(: $bound)?,)* $(const $c: $ct)?>($($arg: $ty),*) {
                    unsafe { $body::<$crate::avx2::AvxVnni, $($g,)* $($c)?>($($arg),*) }
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn avx2<$($g $(: $bound)?,)* $(const $c: $ct)?>($($arg: $ty),*) {
                    unsafe { $body::<$crate::avx2::Avx2, $($g,)* $($c)?>($($arg),*) }
                }
                // SAFETY: an `Isa` exists only for sets whose features were detected.
                unsafe {
                    match isa.0 {
                        $crate::simd::Set::Avx512 | $crate::simd::Set::Avx512Bf16 => {
                            return avx512::<$($g,)* $($c)?>($($arg),*)
                        }
                        $crate::simd::Set::AvxVnni => return avxvnni::<$($g,)* $($c)?>($($arg),*),
                        $crate::simd::Set::Avx2 => return avx2::<$($g,)* $($c)?>($($arg),*),
                        _ => {}
                    }
                }
            }
            #[cfg(target_arch = "aarch64")]
            {
                #[target_feature(enable = "neon,i8mm")]
                unsafe fn i8mm<$($g $(: $bound)?,)* $(const $c: $ct)?>($($arg: $ty),*) {
                    unsafe { $body::<$crate::neon::Neon<$crate::neon::I8mm>, $($g,)* $($c)?>($($arg),*) }
                }
                #[target_feature(enable = "neon,dotprod")]
                unsafe fn dotprod<$($g $(: $bound)?,)* $(const $c: $ct)?>($($arg: $ty),*) {
                    unsafe { $body::<$crate::neon::Neon<$crate::neon::Dotprod>, $($g,)* $($c)?>($($arg),*) }
                }
                // Apart from plain code, as the others are: their frames are large.
                #[inline(never)]
                unsafe fn neon<$($g $(: $bound)?,)* $(const $c: $ct)?>($($arg: $ty),*) {
                    unsafe { $body::<$crate::neon::Neon<$crate::neon::Widening>, $($g,)* $($c)?>($($arg),*) }
                }
                // SAFETY: as above; every aarch64 CPU that Rust's standard library runs on has NEON.
                unsafe {
                    match isa.0 {
                        $crate::simd::Set::NeonI8mm => return i8mm::<$($g,)* $($c)?>($($arg),*),
                        $crate::simd::Set::NeonDot => return dotprod::<$($g,)* $($c)?>($($arg),*),
                        $crate::simd::Set::Neon => return neon::<$($g,)* $($c)?>($($arg),*),
                        _ => {}
                    }
                }
            }
            let _ = isa;
            unsafe { $body::<$crate::scalar::Scalar, $($g,)* $($c)?>($($arg),*) }
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    type Floats = [f32; LANES];

    dispatch! {
        unsafe fn of_floats<>(a: &Floats, b: &Floats, out: &mut Vec<u32>) = of_floats_body
    }

    /// What operations on floats make of two vectors: a NaN is one, whatever its bits.
    #[inline(always)]
    unsafe fn of_floats_body<S: Simd>(a: &Floats, b: &Floats, out: &mut Vec<u32>) {
        // SAFETY: sixteen of everything; the test has the set from `available`.
        unsafe {
            let (x, y) = (S::load_f32(a.as_ptr()), S::load_f32(b.as_ptr()));
            let below = S::mul(S::abs(x), S::splat(-1.0));
            let made = [
                S::exp(x),
                S::exp2(below),
                S::max(x, y),
                S::max(y, x),
                S::keep_unequal(x, x, y),
                S::fma(x, y, x),
                S::div(x, y),
            ];
            for made in made {
                let mut floats = [0f32; LANES];
                S::store(floats.as_mut_ptr(), made);
                let bits = |x: f32| if x.is_nan() { u32::MAX } else { x.to_bits() };
                out.extend(floats.map(bits));
            }
            let mut halves = [0u16; LANES];
            S::store_f16(halves.as_mut_ptr(), x);
            let nan = |h: u16| h & 0x7FFF > 0x7C00;
            out.extend(halves.map(|h| if nan(h) { u32::MAX } else { h.into() }));
            S::store_bf16(halves.as_mut_ptr(), x);
            let nan = |h: u16| h & 0x7FFF > 0x7F80;
            out.extend(halves.map(|h| if nan(h) { u32::MAX } else { h.into() }));
        }
    }

    dispatch! {
        unsafe fn of_bytes<>(codes: &[u8; 4 * LANES], x: [i8; 4], out: &mut Vec<u32>) = of_bytes_body
    }

    /// What operations on bytes make of them.
    #[inline(always)]
    unsafe fn of_bytes_body<S: Simd>(codes: &[u8; 4 * LANES], x: [i8; 4], out: &mut Vec<u32>) {
        // SAFETY: as above; four bytes at `x`.
        unsafe {
            let all = S::load(codes.as_ptr());
            let small = S::dot4::<true>(S::sums_splat(7), S::and(all, 127), x.as_ptr());
            let mut dots = S::dot4::<false>(S::sums_zero(), all, x.as_ptr());
            if S::CENTRED {
                let sum: i32 = x.iter().map(|x| i32::from(*x)).sum();
                dots = S::sums_add(dots, S::sums_splat(128 * sum));
            }
            let made = [
                S::to_f32(small),
                S::to_f32(dots),
                S::to_f32(S::sums_shift(small, 3)),
                S::load_f16(codes.as_ptr().cast()),
                S::load_u8(codes.as_ptr(), 4, 15),
                S::load_i8(codes.as_ptr()),
                S::load_e8m0(codes.as_ptr()),
            ];
            for made in made {
                let mut floats = [0f32; LANES];
                S::store(floats.as_mut_ptr(), made);
                let bits = |x: f32| if x.is_nan() { u32::MAX } else { x.to_bits() };
                out.extend(floats.map(bits));
            }
            for made in [S::shr_mask::<3>(all, 31), S::shl_mask::<3>(all, 0xF8)] {
                let mut bytes = [0u8; 4 * LANES];
                S::store_codes(bytes.as_mut_ptr(), made);
                out.extend(bytes.map(u32::from));
            }
            for numbers in [S::load_i8(codes.as_ptr()), S::splat(f32::NAN)] {
                let mut rounded = [0i8; LANES];
                let numbers = S::mul(numbers, S::splat(0.5));
                out.push(S::store_i8(rounded.as_mut_ptr(), numbers) as u32);
                out.extend(rounded.map(|code| code as u32));
            }
        }
    }

    /// Any bytes, the outermost ones often.
    fn bytes<const N: usize>(state: &mut u64) -> [u8; N] {
        std::array::from_fn(|_| {
            *state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            match *state >> 60 {
                0 => 0,
                1 => 255,
                2 => 127,
                3 => 128,
                _ => (*state >> 40) as u8,
            }
        })
    }

    #[test]
    fn every_operation_has_the_bits_of_plain_code() {
        const EDGES: [f32; 16] = [
            0.0,
            -0.0,
            0.5,
            -1.5,
            65504.0,
            65520.0,
            -1e9,
            6e-8,
            3e-5,
            -87.5,
            88.5,
            1e-40,
            f32::NAN,
            -f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
        ];
        let mut state = 1;
        for round in 0..2000 {
            let codes = bytes::<64>(&mut state);
            let x = bytes::<4>(&mut state).map(|x| x as i8);
            let floats = |state: &mut u64, i: usize| -> Floats {
                std::array::from_fn(|lane| match (round + lane) % 3 {
                    0 => EDGES[(lane + i * round) % 16],
                    1 => f32::from_bits(u32::from_le_bytes(bytes(state))),
                    _ => f32::from(bytes::<1>(state)[0] as i8) / 1.37,
                })
            };
            let (a, b) = (floats(&mut state, 1), floats(&mut state, 3));
            let made = |isa| {
                let mut out = Vec::new();
                // SAFETY: the set is available.
                unsafe {
                    of_floats(isa, &a, &b, &mut out);
                    of_bytes(isa, &codes, x, &mut out);
                }
                out
            };
            let want = made(Isa::SCALAR);
            for isa in Isa::available() {
                assert_eq!(made(isa), want, "{isa:?}: {a:?} {b:?} {codes:?} {x:?}");
            }
        }
    }
}
