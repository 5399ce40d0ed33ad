//! Generates the Connect code from the committed descriptor set, so that no protoc is
//! needed to build; `make proto` renews the set from `proto/`.

fn main() {
    println!("cargo:rerun-if-changed=../../proto/descriptors.bin");
    connectrpc_build::Config::new()
        .descriptor_set("../../proto/descriptors.bin")
        .files(&[
            "process/process.proto",
            "filesystem/filesystem.proto",
            "host/host.proto",
        ])
        .include_file("_connectrpc.rs")
        .compile()
        .expect("proto/descriptors.bin must hold what `make proto` wrote");
}
