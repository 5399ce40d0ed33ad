//! Kernels out of bzImages: the header, and the LZ4 payload.
#![no_main]
#![allow(
    dead_code,
    reason = "the parser's file has more than this target calls"
)]

#[path = "../../crates/image/src/bzimage.rs"]
mod parser;

use libfuzzer_sys::fuzz_target;

// Whether this is all of the file or only its payload's blocks.
fuzz_target!(|data: &[u8]| {
    let Some((whole, bytes)) = data.split_first() else {
        return;
    };
    if whole % 2 == 0 {
        let _ = parser::extract_elf(bytes);
        return;
    }
    // A sound header, so that the payload is reached.
    // One sector of setup code after the boot sector, and the payload right behind it.
    let mut image = vec![0; 2 * 512];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
    payload.extend_from_slice(bytes);
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
    image.extend(payload);
    if let Ok(elf) = parser::extract_elf(&image) {
        assert!(elf.starts_with(b"\x7fELF"));
    }
});
