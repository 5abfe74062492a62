//! Stop strings across token edges: text goes in as it comes, and what may still become a stop
//! stays inside. Knows no tokens.

/// What one piece of text released.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Released {
    /// Text that is certainly not part of a stop.
    pub text: String,
    /// The stop that was completed, by its index: the text ended before it.
    pub hit: Option<usize>,
}

/// Cuts a text at the first of several stop strings.
///
/// The stop that is complete first ends the text, whatever pieces the text came in; of two
/// complete at once the longer counts. Matching is Knuth, Morris and Pratt's (1977): work grows
/// with the bytes of text times the number of stops, however the stops look.
#[derive(Debug, Clone)]
pub struct StopBuffer {
    stops: Vec<Needle>,
    held: String,
    ended: bool,
}

#[derive(Debug, Clone)]
struct Needle {
    bytes: Vec<u8>,
    /// `fallback[n]`: the longest proper prefix that also ends the first `n` bytes.
    fallback: Vec<usize>,
    /// How many of its first bytes the text ends with now.
    matched: usize,
}

impl Needle {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes().to_vec();
        let mut fallback = vec![0; bytes.len() + 1];
        let mut matched = 0;
        for n in 1..bytes.len() {
            while matched > 0 && bytes[n] != bytes[matched] {
                matched = fallback[matched];
            }
            matched += usize::from(bytes[n] == bytes[matched]);
            fallback[n + 1] = matched;
        }
        Self {
            bytes,
            fallback,
            matched: 0,
        }
    }

    /// Take one byte; true when it completes the string.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

impl StopBuffer {
    /// Watch for these strings. Empty ones never match (`Options` refuses them).
    pub fn new(stops: &[String]) -> Self {
        // An index must stay an index of `stops`, so an empty one is kept as unmatchable: no UTF-8
        // text holds the byte 0xFF.
        let needle = |stop: &String| match stop.is_empty() {
            true => Needle {
                bytes: vec![0xFF],
                fallback: vec![0, 0],
                matched: 0,
            },
            false => Needle::new(stop),
        };
        Self {
            stops: stops.iter().map(needle).collect(),
            held: String::new(),
            ended: false,
        }
    }

    /// Take more text, give what is free to go. After a hit nothing comes any more.
    pub fn push(&mut self, text: &str) -> Released {
        if self.ended {
            return Released::default();
        }
        if self.stops.is_empty() {
            return Released {
                text: text.to_owned(),
                hit: None,
            };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            if let Some((hit, length)) = self.advance(byte) {
                self.ended = true;
                self.held.truncate(before + i + 1 - length);
                return Released {
                    text: std::mem::take(&mut self.held),
                    hit: Some(hit),
                };
            }
        }
        let keep = self
            .stops
            .iter()
            .map(|stop| stop.matched)
            .max()
            .unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Released {
            text: std::mem::replace(&mut self.held, rest),
            hit: None,
        }
    }

    /// The text is over: what was held back was no stop after all.
    pub fn finish(&mut self) -> String {
        self.ended = true;
        std::mem::take(&mut self.held)
    }

    /// Feed one byte to every needle; the longest completed one, with its length.
    fn advance(&mut self, byte: u8) -> Option<(usize, usize)> {
        let mut longest: Option<(usize, usize)> = None;
        for (i, stop) in self.stops.iter_mut().enumerate() {
            let complete = stop.advance(byte);
            if complete && longest.is_none_or(|(_, length)| stop.bytes.len() > length) {
                longest = Some((i, stop.bytes.len()));
            }
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Push the pieces, then finish: all text released, and the stop hit.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<usize>) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut buffer = StopBuffer::new(&stops);
        let mut text = String::new();
        for piece in pieces {
            let released = buffer.push(piece);
            text += &released.text;
            if released.hit.is_some() {
                assert_eq!(buffer.push("more"), Released::default());
                assert_eq!(buffer.finish(), "");
                return (text, released.hit);
            }
        }
        (text + &buffer.finish(), None)
    }

    /// The definition: the shortest prefix of the text that ends with a stop, less that stop.
    fn naive(stops: &[&str], text: &str) -> (String, Option<usize>) {
        for (end, _) in text.char_indices().map(|(i, c)| (i + c.len_utf8(), c)) {
            let found = (0..stops.len()).filter(|i| text[..end].ends_with(stops[*i]));
            if let Some(i) = found.max_by_key(|i| (stops[*i].len(), usize::MAX - i)) {
                return (text[..end - stops[i].len()].to_owned(), Some(i));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn a_stop_split_over_tokens_never_leaks() {
        assert_eq!(
            run(&["STOP"], &["hel", "lo ST", "OP more"]),
            ("hello ".into(), Some(0))
        );
        let mut buffer = StopBuffer::new(&["STOP".to_string()]);
        assert_eq!(buffer.push("lo ST").text, "lo ");
        assert_eq!(buffer.push("A").text, "STA");
    }

    #[test]
    fn what_turned_out_to_be_no_stop_comes_out_at_the_end() {
        assert_eq!(run(&["STOP"], &["a ST", "O"]), ("a STO".into(), None));
    }

    #[test]
    fn the_stop_complete_first_wins_and_of_two_at_once_the_longer() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), ("xa".into(), Some(1)));
        assert_eq!(run(&["c", "abc"], &["xab", "cd"]), ("x".into(), Some(1)));
        assert_eq!(run(&["ab", "ab"], &["ab"]), ("".into(), Some(0)));
    }

    #[test]
    fn characters_are_never_cut() {
        // é is C3 A9, è is C3 A8: the first byte alone must not be held or split.
        assert_eq!(
            run(&["é!"], &["è", "é", "è", "é", "!"]),
            ("èéè".into(), Some(0))
        );
    }

    #[test]
    fn without_stops_text_passes_at_once() {
        let mut buffer = StopBuffer::new(&[]);
        assert_eq!(buffer.push("abc").text, "abc");
        assert_eq!(run(&[""], &["abc"]), ("abc".into(), None));
    }

    #[test]
    fn any_cut_of_any_text_gives_what_the_definition_gives() {
        let alphabet = ["a", "b", "é", "\u{1F600}"];
        let mut state = 7u64;
        let mut random = |n: usize| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        for _ in 0..3000 {
            let mut word = |longest: usize| -> String {
                (0..1 + random(longest))
                    .map(|_| alphabet[random(4)])
                    .collect()
            };
            let stops: Vec<String> = (0..3).map(|_| word(5)).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let pieces: Vec<String> = (0..6).map(|_| word(4)).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            assert_eq!(
                run(&stops, &pieces),
                naive(&stops, &pieces.concat()),
                "{stops:?} {pieces:?}"
            );
        }
    }

    #[test]
    fn a_spiteful_stop_costs_linear_time() {
        let stops = vec![format!("{}b", "a".repeat(4095)); 64];
        let mut buffer = StopBuffer::new(&stops);
        let start = std::time::Instant::now();
        for _ in 0..2_000 {
            assert_eq!(buffer.push("aaaaaaaa").hit, None);
        }
        assert!(start.elapsed().as_secs() < 5);
        assert_eq!(buffer.finish().len(), 4095);
    }
}
