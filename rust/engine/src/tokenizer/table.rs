//! A vocabulary's tokens by text and by id, and its merges by pair: flat tables that a hostile file cannot
//! make slow, since their hashes are seeded.

use std::hash::{BuildHasher, RandomState};

/// Ids and merges beyond these are left to the library: a pair and its rank are one 64-bit word here.
pub(super) const MAX_IDS: usize = 1 << 21;
pub(super) const MAX_MERGES: usize = (1 << 22) - 1;

const GAP: u32 = u32::MAX;

/// A keyed hash of bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seed(u64, u64);

impl Seed {
    pub fn new() -> Self {
        let state = RandomState::new();
        Self(state.hash_one(1u8) | 1, state.hash_one(2u8) | 1)
    }

    #[inline]
    pub fn word(self, a: u64, b: u64) -> u64 {
        let product = u128::from(a ^ self.0) * u128::from(b ^ self.1);
        (product as u64) ^ (product >> 64) as u64
    }

    #[inline]
    pub fn bytes(self, bytes: &[u8]) -> u64 {
        let mut rest = bytes;
        let mut state = bytes.len() as u64;
        while let Some((head, tail)) = rest.split_first_chunk::<16>() {
            let value = u128::from_le_bytes(*head);
            state = self.word(state ^ value as u64, (value >> 64) as u64);
            rest = tail;
        }
        let (a, b) = match rest.len() {
            8.. => (first8(rest), last8(rest)),
            4.. => (u64::from(first4(rest)), u64::from(last4(rest))),
            1.. => (
                u64::from(rest[0]) << 8 | u64::from(rest[rest.len() / 2]),
                u64::from(rest[rest.len() - 1]),
            ),
            _ => (0, 0),
        };
        self.word(state ^ a.rotate_left(32), b ^ state.rotate_left(17))
    }
}

fn first8(bytes: &[u8]) -> u64 {
    bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}

fn last8(bytes: &[u8]) -> u64 {
    bytes.last_chunk().map_or(0, |b| u64::from_le_bytes(*b))
}

fn first4(bytes: &[u8]) -> u32 {
    bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}

fn last4(bytes: &[u8]) -> u32 {
    bytes.last_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}

/// Token bytes to id and back. Every token and every id occurs once.
#[derive(Debug)]
pub(crate) struct Table {
    arena: Vec<u8>,
    /// Start and length by id.
    spans: Vec<(u32, u32)>,
    /// Upper half of the hash, and id + 1; zero is empty.
    slots: Vec<u64>,
    seed: Seed,
    count: usize,
}

impl Table {
    /// Room for `count` tokens of `bytes` bytes in all.
    pub fn with_capacity(count: usize, bytes: usize) -> Self {
        Self {
            arena: Vec::with_capacity(bytes),
            spans: Vec::with_capacity(count),
            slots: vec![0; (count * 2).next_power_of_two().max(16)],
            seed: Seed::new(),
            count: 0,
        }
    }

    /// A token's hash, for the calls that take one.
    #[inline]
    pub fn hash(&self, token: &[u8]) -> u64 {
        self.seed.bytes(token)
    }

    /// Bring what looking these up takes into the caches, all side by side: a table of 128k tokens is read in
    /// half the time when lookups do not wait for memory one by one.
    pub fn warm(&self, hashes: &[u64]) {
        let mask = self.slots.len() - 1;
        let mut seen = 0;
        let slot = |hash: &u64| self.slots[*hash as usize & mask];
        let span = |hash: &u64| {
            let id = (slot(hash) as u32).wrapping_sub(1);
            self.spans.get(id as usize).copied().unwrap_or_default()
        };
        hashes.iter().for_each(|hash| seen ^= slot(hash));
        hashes
            .iter()
            .for_each(|hash| seen ^= u64::from(span(hash).0));
        for hash in hashes {
            let byte = self.arena.get(span(hash).0 as usize);
            seen ^= u64::from(byte.copied().unwrap_or(0));
        }
        std::hint::black_box(seen);
    }

    /// Add a token; `None` when the token or the id is there already, or beyond what a table holds.
    pub fn insert(&mut self, token: &[u8], id: u32) -> Option<()> {
        self.insert_hashed(self.hash(token), token, id)
    }

    /// The same, with the token's hash.
    pub fn insert_hashed(&mut self, hash: u64, token: &[u8], id: u32) -> Option<()> {
        let index = id as usize;
        let start = u32::try_from(self.arena.len()).ok()?;
        let length = u32::try_from(token.len()).ok().filter(|&n| n != GAP)?;
        if index >= MAX_IDS || self.count * 2 >= self.slots.len() {
            return None;
        }
        if self.spans.len() <= index {
            self.spans.resize(index + 1, (0, GAP));
        }
        if self.spans[index].1 != GAP {
            return None;
        }
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while self.slots[at] != 0 {
            if self.is_at(at, hash, token).is_some() {
                return None;
            }
            at = (at + 1) & mask;
        }
        self.slots[at] = hash >> 32 << 32 | u64::from(id + 1);
        self.spans[index] = (start, length);
        self.arena.extend_from_slice(token);
        self.count += 1;
        Some(())
    }

    #[inline]
    fn is_at(&self, at: usize, hash: u64, token: &[u8]) -> Option<u32> {
        let slot = self.slots[at];
        if slot >> 32 != hash >> 32 {
            return None;
        }
        let id = slot as u32 - 1;
        (self.bytes(id) == Some(token)).then_some(id)
    }

    /// The id of a token.
    #[inline]
    pub fn get(&self, token: &[u8]) -> Option<u32> {
        self.get_hashed(self.hash(token), token)
    }

    /// The same, with the token's hash.
    #[inline]
    pub fn get_hashed(&self, hash: u64, token: &[u8]) -> Option<u32> {
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        while self.slots[at] != 0 {
            if let Some(id) = self.is_at(at, hash, token) {
                return Some(id);
            }
            at = (at + 1) & mask;
        }
        None
    }

    /// The bytes of an id.
    #[inline]
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        let &(start, length) = self.spans.get(id as usize).filter(|span| span.1 != GAP)?;
        self.arena
            .get(start as usize..start as usize + length as usize)
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Highest id plus one.
    pub fn end(&self) -> usize {
        self.spans.len()
    }

    /// Ids and bytes in order of ids.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u8])> {
        (0..self.end() as u32).filter_map(|id| Some((id, self.bytes(id)?)))
    }
}

/// Pairs of ids to the rank of their merge, and ranks to the merged id.
#[derive(Debug)]
pub(crate) struct Pairs {
    /// 21 bits of each id, 22 bits of rank; all ones is empty.
    slots: Vec<u64>,
    merged: Vec<u32>,
    /// Ranks of the pairs of two bytes, where symbols are bytes.
    bytes: Vec<u32>,
    seed: Seed,
}

/// No merge.
pub(super) const NONE: u32 = u32::MAX;
const EMPTY: u64 = u64::MAX;
const RANK_BITS: u32 = 22;

impl Pairs {
    pub fn with_capacity(count: usize) -> Self {
        Self {
            slots: vec![EMPTY; (count * 2).next_power_of_two().max(16)],
            merged: Vec::with_capacity(count),
            bytes: Vec::new(),
            seed: Seed::new(),
        }
    }

    fn key(left: u32, right: u32) -> u64 {
        u64::from(left) << 21 | u64::from(right)
    }

    #[inline]
    fn start(&self, key: u64) -> usize {
        self.seed.word(key, key) as usize & (self.slots.len() - 1)
    }

    /// Bring the places of these merges' pairs into the caches.
    pub fn warm(&self, merges: &[(u32, u32, u32)]) {
        let slot =
            |&(left, right, _): &(u32, u32, u32)| self.slots[self.start(Self::key(left, right))];
        std::hint::black_box(merges.iter().fold(0, |seen, merge| seen ^ slot(merge)));
    }

    /// Add the next merge: of a pair that is there already, the later rank counts. `None` when full.
    pub fn push(&mut self, left: u32, right: u32, merged: u32) -> Option<()> {
        let rank = self.merged.len();
        if rank >= MAX_MERGES || rank * 2 >= self.slots.len() {
            return None;
        }
        let key = Self::key(left, right);
        let mut at = self.start(key);
        while self.slots[at] != EMPTY && self.slots[at] >> RANK_BITS != key {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = key << RANK_BITS | rank as u64;
        self.merged.push(merged);
        Some(())
    }

    /// Note which ids are bytes: their pairs are what every word begins with.
    pub fn note_bytes(&mut self, ids: &[u32; 256]) {
        let end = ids.iter().filter(|&&id| id != NONE).max();
        let mut byte_of = vec![None; end.map_or(0, |&id| id as usize + 1)];
        for (byte, &id) in ids.iter().enumerate().filter(|(_, id)| **id != NONE) {
            byte_of[id as usize] = Some(byte);
        }
        let byte_of = |id: u64| byte_of.get(id as usize).copied().flatten();
        self.bytes = vec![NONE; 1 << 16];
        for slot in self.slots.iter().filter(|&&slot| slot != EMPTY) {
            let (left, right) = (
                slot >> (RANK_BITS + 21),
                slot >> RANK_BITS & ((1 << 21) - 1),
            );
            if let (Some(left), Some(right)) = (byte_of(left), byte_of(right)) {
                self.bytes[left << 8 | right] = (slot & ((1 << RANK_BITS) - 1)) as u32;
            }
        }
    }

    /// The rank of a pair of bytes, once these are noted.
    #[inline]
    pub fn first(&self, left: u8, right: u8) -> u32 {
        self.bytes[usize::from(left) << 8 | usize::from(right)]
    }

    /// The rank of a pair's merge, [`NONE`] when there is none.
    #[inline]
    pub fn rank(&self, left: u32, right: u32) -> u32 {
        let key = Self::key(left, right);
        let mut at = self.start(key);
        loop {
            let slot = self.slots[at];
            if slot == EMPTY {
                return NONE;
            }
            if slot >> RANK_BITS == key {
                return (slot & ((1 << RANK_BITS) - 1)) as u32;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    /// What a merge of this rank makes.
    #[inline]
    pub fn merged(&self, rank: u32) -> u32 {
        self.merged[rank as usize]
    }

    /// The ids that are parts of merges, some more than once.
    pub fn parts(&self) -> impl Iterator<Item = u32> {
        let keys = self
            .slots
            .iter()
            .filter(|&&slot| slot != EMPTY)
            .map(|slot| slot >> RANK_BITS);
        keys.flat_map(|key| [(key >> 21) as u32, (key & ((1 << 21) - 1)) as u32])
    }

    /// What merges make, in order of ranks.
    pub fn results(&self) -> &[u32] {
        &self.merged
    }
}
