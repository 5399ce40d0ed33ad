//! Runs a fuzz target's property as an ordinary test: in every `make test`, without a
//! compiler's instrumentation. Part of each `crates/*/tests/fuzz.rs`.
//!
//! Each input of the kept corpus, fuzz/corpus, is tried, then mutations of it for a while. The
//! numbers that choose them follow from a fixed seed, for a test that has passed should pass
//! again; WRENN_FUZZ_SEED chooses others, and `make fuzz` looks where no chance would lead.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long each target runs, and with WRENN_TEST_LONG.
const SECONDS: [u64; 2] = [3, 60];
/// No input becomes longer.
const MAX_INPUT: usize = 6000;
const SEED: u64 = 0x5745_4e4e;

/// Numbers by xorshift64*: no secret and no statistics depend on them.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 33) as usize % bound.max(1)
    }

    fn byte(&mut self) -> u8 {
        match self.below(3) {
            0 => (self.next() >> 40) as u8,
            // Text stays text.
            1 => b' ' + self.below(95) as u8,
            _ => b"\0\n\r/.:-=\"{}\x7f\xff\x01\x02\x80"[self.below(16)],
        }
    }

    /// A part of `data`, empty perhaps.
    fn part(&mut self, data: &[u8]) -> std::ops::Range<usize> {
        let from = self.below(data.len() + 1);
        let length = self.below((data.len() - from).min(64) + 1);
        from..from + length
    }

    /// Changes `data` a little, with parts of `other`.
    fn mutate(&mut self, data: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(6) {
            let at = self.below(data.len() + 1);
            match self.below(7) {
                0 if at < data.len() => data[at] ^= 1 << self.below(8),
                1 if at < data.len() => data[at] = self.byte(),
                2 => data.insert(at, self.byte()),
                3 => {
                    let part = self.part(data);
                    data.drain(part);
                }
                4 => {
                    let part = self.part(data);
                    let copy = data[part].to_vec();
                    data.splice(at..at, copy);
                }
                5 => {
                    let part = self.part(other);
                    data.splice(at..at, other[part].iter().copied());
                }
                _ => {
                    let part = self.part(data);
                    data[part].reverse();
                }
            }
        }
        data.truncate(MAX_INPUT);
    }
}

fn folder(of: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../")
        .join(of)
}

/// Tries one input; what breaks the property is kept for whoever looks into it.
fn try_one(target: &str, input: &[u8], check: fn(&[u8])) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(input))) {
        let kept = folder("target/fuzz/artifacts");
        std::fs::create_dir_all(&kept).unwrap();
        let file = kept.join(format!("{target}-test"));
        std::fs::write(&file, input).unwrap();
        println!("{target}: broken by {}: {input:?}", file.display());
        resume_unwind(panic);
    }
}

/// Everything in the corpus, and nonsense made from it, for a while.
pub fn run(target: &str, check: fn(&[u8])) {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder("fuzz/corpus").join(target))
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).unwrap()).collect();
    assert!(!corpus.is_empty(), "{target} has a corpus");
    for input in &corpus {
        try_one(target, input, check);
    }
    let seed = std::env::var("WRENN_FUZZ_SEED").map_or(SEED, |seed| seed.parse().unwrap());
    let mut numbers = Numbers(seed | 1);
    let long = std::env::var_os("WRENN_TEST_LONG").is_some();
    let end = Instant::now() + Duration::from_secs(SECONDS[usize::from(long)]);
    let mut runs = 0u64;
    while Instant::now() < end {
        let mut input = corpus[numbers.below(corpus.len())].clone();
        let other = &corpus[numbers.below(corpus.len())];
        numbers.mutate(&mut input, other);
        try_one(target, &input, check);
        runs += 1;
    }
    println!("{target}: {runs} inputs");
    assert!(runs > 0);
}
