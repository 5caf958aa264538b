# One vLLM engine on one node, on GPUs that other engines use in turn.
#
# `rotator jobs render` fills the variables in from a recipe and the site file; docs/jobs.md says what each one is.
# No device block: Nomad would give the GPUs to this job alone. The job gpu-lease holds them; here they are named.

variable "job_id" { type = string }
variable "namespace" { type = string }
variable "node_pool" { type = string }
variable "node" { type = string } # the client's unique name
variable "engine" { type = string }
variable "recipe" { type = string }
variable "image" { type = string }            # repository@sha256:…
variable "entrypoint" { type = list(string) } # the program; arguments follow as list elements
variable "model_dir" { type = string }
variable "cache_dir" { type = string } # must exist: compiled kernels stay over restarts
variable "served_name" { type = string }
variable "args" { type = list(string) }
variable "env" { type = map(string) }
variable "gpu_uuids" { type = list(string) }
variable "tensor_parallel" { type = number }
variable "pipeline_parallel" { type = number }
variable "port" { type = number }
variable "cpu" { type = number } # MHz as shares: engines that sleep need none, so no cores are taken for one alone
variable "memory_mb" { type = number } # covers the masters of sleeping weights, which are locked host RAM
variable "shm_mb" { type = number }
variable "tmp_mb" { type = number }
variable "free_mib" { type = number } # VRAM that must be free on each GPU before the engine starts
variable "gate_tries" { type = number } # one every two seconds
variable "ipc_mode" { type = string }   # "" for a /dev/shm of its own, which ends with the container
variable "overlay_root" { type = string }
variable "overlays" { type = map(string) } # file in the bundle -> path inside the image
variable "spill_dir" { type = string }     # "" for none: masters on disk
variable "kill_timeout" { type = string }
variable "healthy_deadline" { type = string }
variable "progress_deadline" { type = string }

locals {
  gpus = join(",", var.gpu_uuids)

  # The least free memory of the GPUs named, in MiB. What another engine leaves behind after a crash takes a while to go.
  wait_for_vram = <<-EOT
    for try in $(seq "$TRIES"); do
      free=$(nvidia-smi --query-gpu=memory.free --format=csv,noheader,nounits | sort -n | head -n 1)
      if [ "$free" -ge "$NEED" ]; then echo "VRAM is free: $free MiB of $NEED"; exit 0; fi
      echo "waiting for VRAM: $free MiB of $NEED are free"
      sleep 2
    done
    nvidia-smi
  EOT

  mounts = concat(
    [
      { type = "bind", source = var.model_dir, target = "/models/current", readonly = true },
      { type = "bind", source = var.cache_dir, target = "/root/.cache" },
      { type = "tmpfs", target = "/tmp", tmpfs_options = { size = var.tmp_mb * 1048576 } },
    ],
    [for dir in [var.spill_dir] : { type = "bind", source = dir, target = "/spill" } if dir != ""],
    [for file, path in var.overlays : {
      type = "bind", source = "${var.overlay_root}/${file}", target = path, readonly = true
    }],
  )
}

job "vllm-engine" {
  id          = var.job_id
  name        = var.job_id
  namespace   = var.namespace
  type        = "service"
  node_pool   = var.node_pool
  datacenters = ["*"]

  meta = {
    role     = "vllm-engine"
    engine   = var.engine
    recipe   = var.recipe
    overlays = var.overlay_root # named by content: a new bundle is a visible change
  }

  constraint {
    attribute = "${node.unique.name}"
    value     = var.node
  }

  # A crash stays down until the rotation service acts: a crash loop leaves VRAM behind in every round.
  reschedule {
    attempts  = 0
    unlimited = false
  }

  update {
    max_parallel      = 1
    canary            = 0 # a canary would need a second set of GPUs
    health_check      = "checks"
    min_healthy_time  = "10s"
    healthy_deadline  = var.healthy_deadline
    progress_deadline = var.progress_deadline
    auto_revert       = false # an old version must not start behind the service's back
  }

  group "engine" {
    count = 1

    restart {
      attempts = 0
      mode     = "fail"
    }

    # A client out of reach keeps its engine: it may still be serving.
    disconnect {
      lost_after = "1h"
      replace    = false
      reconcile  = "keep_original"
    }

    ephemeral_disk {
      size = 1500 # MB, above ten log files of 50 MB for each of two streams
    }

    network {
      mode = "host"
      port "http" {
        static       = var.port
        host_network = "loopback"
      }
    }

    service {
      name     = var.job_id
      provider = "nomad"
      port     = "http"

      # No check_restart: a sleeping or compiling engine must not be shot. Answering says only that it is not dead.
      check {
        name     = "health"
        type     = "http"
        path     = "/health"
        interval = "10s"
        timeout  = "5s"
      }
    }

    task "vram-gate" {
      driver = "docker"

      lifecycle {
        hook    = "prestart"
        sidecar = false
      }

      config {
        image           = var.image
        runtime         = "nvidia"
        network_mode    = "none"
        readonly_rootfs = true
        cap_drop        = ["all"]
        entrypoint      = ["/bin/bash", "-uc"]
        args            = ["${local.wait_for_vram}\nexit 75"]
      }

      env {
        NVIDIA_VISIBLE_DEVICES     = local.gpus
        NVIDIA_DRIVER_CAPABILITIES = "utility"
        NEED                       = "${var.free_mib}"
        TRIES                      = "${var.gate_tries}"
      }

      logs {
        max_files     = 2
        max_file_size = 5
      }

      resources {
        cpu    = 100
        memory = 256
      }
    }

    task "vllm" {
      driver       = "docker"
      kill_signal  = "SIGTERM"
      kill_timeout = var.kill_timeout # the client's max_kill_timeout, 30 s by default, must be as long

      config {
        image           = var.image
        runtime         = "nvidia"
        init            = true
        network_mode    = "host"
        ipc_mode        = var.ipc_mode
        shm_size        = var.shm_mb * 1048576
        readonly_rootfs = true
        cap_drop        = ["all"]
        security_opt    = ["no-new-privileges"]
        mounts          = local.mounts
        entrypoint      = var.entrypoint

        ulimit {
          memlock = "-1" # masters are locked memory
          stack   = "67108864"
          nofile  = "1048576"
        }

        # The last word wins in vLLM: what must hold for every engine comes last.
        args = concat(
          ["/models/current", "--served-model-name", var.served_name],
          var.args,
          [
            "--tensor-parallel-size", format("%d", var.tensor_parallel),
            "--pipeline-parallel-size", format("%d", var.pipeline_parallel),
            "--enable-sleep-mode",
            "--host", "127.0.0.1", # /sleep and /collective_rpc run for whoever reaches them
            "--port", format("%d", var.port),
          ],
        )
      }

      env = merge(var.env, {
        ROTATOR_ENGINE             = var.engine # how the service and its agents find the processes
        NVIDIA_VISIBLE_DEVICES     = local.gpus
        NVIDIA_DRIVER_CAPABILITIES = "compute,utility"
        CUDA_DEVICE_ORDER          = "PCI_BUS_ID"
        VLLM_SERVER_DEV_MODE       = "1" # /sleep and /wake_up
        HF_HUB_OFFLINE             = "1"
        TRANSFORMERS_OFFLINE       = "1"
        HOME                       = "/root"
        XDG_CACHE_HOME             = "/root/.cache"
        VLLM_CACHE_ROOT            = "/root/.cache/vllm"
        TRITON_CACHE_DIR           = "/root/.cache/triton"
        TORCHINDUCTOR_CACHE_DIR    = "/root/.cache/inductor"
        FLASHINFER_WORKSPACE_BASE  = "/root/.cache/flashinfer"
        CUDA_CACHE_PATH            = "/root/.cache/nv"
      })

      # Secrets of this engine alone: the Nomad variable nomad/jobs/<job id>, each item an environment variable.
      template {
        destination = "${NOMAD_SECRETS_DIR}/engine.env"
        env         = true
        change_mode = "noop" # the default would restart the engine
        data        = <<-EOT
          {{- if nomadVarExists "nomad/jobs/${var.job_id}" }}
          {{- with nomadVar "nomad/jobs/${var.job_id}" }}
          {{- range .Tuples }}
          {{ .K }}={{ .V | toJSON }}
          {{- end }}
          {{- end }}
          {{- end }}
        EOT
      }

      logs {
        max_files     = 10
        max_file_size = 50
      }

      resources {
        cpu    = var.cpu
        memory = var.memory_mb
      }
    }

    # After a clean stop the allocation ends only when the bytes are back. Crashes skip it: the gate covers those.
    task "vram-drain" {
      driver = "docker"

      lifecycle {
        hook    = "poststop"
        sidecar = false
      }

      config {
        image           = var.image
        runtime         = "nvidia"
        network_mode    = "none"
        readonly_rootfs = true
        cap_drop        = ["all"]
        entrypoint      = ["/bin/bash", "-uc"]
        args            = ["${local.wait_for_vram}\nexit 0"]
      }

      env {
        NVIDIA_VISIBLE_DEVICES     = local.gpus
        NVIDIA_DRIVER_CAPABILITIES = "utility"
        NEED                       = "${var.free_mib}"
        TRIES                      = "30"
      }

      logs {
        max_files     = 2
        max_file_size = 5
      }

      resources {
        cpu    = 100
        memory = 256
      }
    }
  }
}
