//! A guest of a hundred bytes, which runs on any KVM: plain 64-bit code that needs no interrupt,
//! no page table but the one Firecracker makes, and no device but the serial port.
//!
//! It fills 64 pages at 32 MiB with [`FRESH`] and then works in rounds, of which it prints the
//! number (`T` and eight hexadecimal digits). Round `n` takes page `n % 64`, checks that it
//! holds what round `n - 64` left there, and fills it with `n`, or clears it where bit 6 of `n`
//! is set. If it finds something else it prints `B` instead of `T`. So all 64 pages follow from
//! the number, and [`expected`] tells what they hold.

/// Where the guest's pages are.
pub const WORK_AT: u64 = 0x0200_0000;
/// How many.
pub const WORK_PAGES: u64 = 64;

const PAGE: usize = 4096;

/// What a page holds before its first round.
const FRESH: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// Where the program is loaded: above the first MiB, where Firecracker expects a kernel.
pub const LOAD_AT: u64 = 0x0010_0000;

/// The program; offsets of jumps are relative to the next instruction.
const CODE: [&[u8]; 49] = [
    &[0xfc],                                                       // cld
    &[0xbf, 0, 0, 0, 0x02],                                        // mov edi, 0x2000000
    &[0xb9, 0, 0x80, 0, 0],                                        // mov ecx, 64 * 512
    &[0x48, 0xb8, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a, 0x5a], // mov rax, FRESH
    &[0xf3, 0x48, 0xab],                                           // rep stosq
    &[0x31, 0xdb],                                                 // xor ebx, ebx
    // round:
    &[0xff, 0xc3],                // inc ebx
    &[0x41, 0xb0, b'T'],          // mov r8b, 'T'
    &[0x89, 0xd8],                // mov eax, ebx
    &[0x83, 0xe0, 63],            // and eax, 63
    &[0xc1, 0xe0, 12],            // shl eax, 12
    &[0x8d, 0xb8, 0, 0, 0, 0x02], // lea edi, [rax + 0x2000000]
    &[0x89, 0xda],                // mov edx, ebx
    &[0x83, 0xea, 64],            // sub edx, 64
    &[0x76, 0x19],                // jbe write
    &[0x0f, 0xba, 0xe2, 6],       // bt edx, 6
    &[0x73, 0x02],                // jnc compare
    &[0x31, 0xd2],                // xor edx, edx
    // compare:
    &[0x48, 0x39, 0x17],                   // cmp [rdi], rdx
    &[0x75, 0x09],                         // jne bad
    &[0x48, 0x39, 0x97, 0xf8, 0x0f, 0, 0], // cmp [rdi + 4088], rdx
    &[0x74, 0x03],                         // je write
    // bad:
    &[0x41, 0xb0, b'B'], // mov r8b, 'B'
    // write:
    &[0x89, 0xd8],          // mov eax, ebx
    &[0x0f, 0xba, 0xe3, 6], // bt ebx, 6
    &[0x73, 0x02],          // jnc fill
    &[0x31, 0xc0],          // xor eax, eax
    // fill:
    &[0xb9, 0, 0x02, 0, 0],    // mov ecx, 512
    &[0xf3, 0x48, 0xab],       // rep stosq
    &[0xba, 0xf8, 0x03, 0, 0], // mov edx, 0x3f8
    &[0x44, 0x88, 0xc0],       // mov al, r8b
    &[0xee],                   // out dx, al
    &[0xb9, 8, 0, 0, 0],       // mov ecx, 8
    // digit:
    &[0xc1, 0xc3, 4],          // rol ebx, 4
    &[0x88, 0xd8],             // mov al, bl
    &[0x24, 15],               // and al, 15
    &[0x3c, 10],               // cmp al, 10
    &[0x72, 0x02],             // jb decimal
    &[0x04, b'a' - b'0' - 10], // add al, 'a' - '0' - 10
    // decimal:
    &[0x04, b'0'],             // add al, '0'
    &[0xee],                   // out dx, al
    &[0xff, 0xc9],             // dec ecx
    &[0x75, 0xec],             // jnz digit
    &[0xb0, b'\n'],            // mov al, '\n'
    &[0xee],                   // out dx, al
    &[0xb9, 0x88, 0x13, 0, 0], // mov ecx, 5000
    // wait:
    &[0xff, 0xc9], // dec ecx
    &[0x75, 0xfc], // jnz wait
    &[0xeb, 0x8b], // jmp round
];

/// A program that waits a little and has the machine reset, which ends Firecracker.
const RESET: [&[u8]; 6] = [
    &[0xb9, 0xa0, 0x86, 0x01, 0], // mov ecx, 100000
    &[0xff, 0xc9],                // dec ecx
    &[0x75, 0xfc],                // jnz to that
    &[0xb0, 0xfe],                // mov al, 0xfe
    &[0xe6, 0x64],                // out 0x64, al
    &[0xeb, 0xfe],                // jmp to itself
];

/// What is at [`LOAD_AT`] in a guest that works.
pub fn program() -> Vec<u8> {
    CODE.concat()
}

/// The guest as a kernel image.
pub fn working() -> Vec<u8> {
    elf(&program())
}

/// A guest that ends at once.
pub fn resetting() -> Vec<u8> {
    elf(&RESET.concat())
}

/// A program as an ELF file with one segment, elf(5).
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u64 = 64;
    const SEGMENT: u64 = 56;
    let begins = HEADER + SEGMENT;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // an executable
    file.extend(62u16.to_le_bytes()); // for x86-64
    file.extend(1u32.to_le_bytes());
    file.extend(LOAD_AT.to_le_bytes()); // entry
    file.extend(HEADER.to_le_bytes()); // program headers
    file.extend(0u64.to_le_bytes()); // no section headers
    file.extend(0u32.to_le_bytes());
    file.extend(
        [HEADER as u16, SEGMENT as u16, 1, 0, 0, 0]
            .map(u16::to_le_bytes)
            .concat(),
    );
    file.extend(1u32.to_le_bytes()); // to be loaded
    file.extend(7u32.to_le_bytes()); // to be read, written and run
    let bytes = code.len() as u64;
    for number in [begins, LOAD_AT, LOAD_AT, bytes, bytes, 4096] {
        file.extend(number.to_le_bytes());
    }
    assert_eq!(file.len() as u64, begins);
    file.extend(code);
    file
}

/// What the guest's pages hold after it has finished round `rounds`.
pub fn expected(rounds: u64) -> Vec<u8> {
    let page = |index: u64| {
        let last = (rounds.saturating_sub(WORK_PAGES - 1)..=rounds)
            .filter(|round| *round > 0)
            .find(|round| round % WORK_PAGES == index);
        match last {
            None => FRESH,
            Some(round) if round & 64 != 0 => 0,
            Some(round) => round,
        }
    };
    (0..WORK_PAGES)
        .flat_map(|index| page(index).to_le_bytes().repeat(PAGE / 8))
        .collect()
}

/// The newest round in a console's text, after checking that the guest was content with all.
pub fn newest_round(console: &str) -> Option<u64> {
    assert!(
        !console.contains('B'),
        "the guest found its memory changed: {console}"
    );
    let whole = console.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let lines = whole.lines().rev();
    lines
        .filter_map(|line| line.strip_prefix('T'))
        .find_map(|number| (number.len() == 8).then(|| u64::from_str_radix(number, 16).ok())?)
}
