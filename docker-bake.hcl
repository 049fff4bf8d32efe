# The images by name: `docker buildx bake demo`, `docker buildx bake qwen3-8b-fp8 --push`.
# The variables come from the environment, and so from .env: set -a; . ./.env; set +a

variable "IMAGE" {
  default = "coldsnap"
}

variable "TAG" {
  default = "dev"
}

variable "COMMIT" {
  default = ""
}

# Of a model baked in the build it is known only afterwards; .github/workflows/image.yml shows the two steps.
variable "SNAPSHOT_DIGEST" {
  default = ""
}

variable "BAKE_SNAPSHOT" {
  default = ""
}

variable "BAKE_MODEL" {
  default = ""
}

variable "BAKE_REVISION" {
  default = "main"
}

variable "BAKE_SCHEME" {
  default = "fp8-dynamic"
}

group "default" {
  targets = ["demo"]
}

target "_image" {
  context    = "."
  dockerfile = "Dockerfile"
  target     = "runtime"
  platforms  = ["linux/amd64"]
  args = {
    VLLM_VERSION     = "0.33.0"
    COLDSNAP_VERSION = "0.1.0"
    COMMIT           = COMMIT
    SNAPSHOT_DIGEST  = SNAPSHOT_DIGEST
  }
}

target "_baked" {
  inherits = ["_image"]
  secret   = ["type=env,id=HF_TOKEN"]
}

target "demo" {
  inherits = ["_image"]
  tags     = ["${IMAGE}:demo-${TAG}"]
  args = {
    BASE_IMAGE      = "debian:bookworm-slim"
    VLLM_VERSION    = "0.32.0"
    SNAPSHOT_DIGEST = "784f95acf909bd571166fa90f4367c1f13ecdd49d748c77e79cfc9c224d41863"
  }
}

target "qwen3-8b-fp8" {
  inherits = ["_baked"]
  tags     = ["${IMAGE}:qwen3-8b-fp8-${TAG}"]
  args = {
    SNAPSHOT = "qwen3-8b-fp8"
    MODEL    = "Qwen/Qwen3-8B"
    SCHEME   = "fp8-dynamic"
  }
}

target "qwen3-8b-w4a16" {
  inherits = ["_baked"]
  tags     = ["${IMAGE}:qwen3-8b-w4a16-${TAG}"]
  args = {
    SNAPSHOT = "qwen3-8b-w4a16"
    MODEL    = "Qwen/Qwen3-8B"
    SCHEME   = "w4a16"
  }
}

target "llama-3.1-8b-fp8" {
  inherits = ["_baked"]
  tags     = ["${IMAGE}:llama-3.1-8b-fp8-${TAG}"]
  args = {
    SNAPSHOT = "llama-3.1-8b-fp8"
    MODEL    = "meta-llama/Llama-3.1-8B-Instruct"
    SCHEME   = "fp8-dynamic"
  }
}

target "mistral-7b-w4a16" {
  inherits = ["_baked"]
  tags     = ["${IMAGE}:mistral-7b-w4a16-${TAG}"]
  args = {
    SNAPSHOT = "mistral-7b-w4a16"
    MODEL    = "mistralai/Mistral-7B-Instruct-v0.3"
    SCHEME   = "w4a16"
  }
}

# BAKE_SNAPSHOT alone takes the folder of that name in snapshots/; with BAKE_MODEL it is baked in the build.
target "bring-your-own" {
  inherits = ["_baked"]
  tags     = ["${IMAGE}:${BAKE_SNAPSHOT}-${TAG}"]
  args = {
    SNAPSHOT = BAKE_SNAPSHOT
    MODEL    = BAKE_MODEL
    REVISION = BAKE_REVISION
    SCHEME   = BAKE_SCHEME
  }
}
