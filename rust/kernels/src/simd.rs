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
    /// at most 127.
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
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// An instruction set that this CPU has: values come from [`Isa::detect`] and [`Isa::available`] alone, so that whoever
/// holds one may run what is compiled for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(pub(crate) Set);

/// The instruction sets that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
                        $crate::simd::Set::Scalar => {}
                    }
                }
            }
            let _ = isa;
            unsafe { $body::<$crate::scalar::Scalar, $($g,)* $($c)?>($($arg),*) }
        }
    };
}
pub(crate) use dispatch;
