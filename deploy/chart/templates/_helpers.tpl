{{/* Every name begins so. Short enough for what is appended. */}}
{{- define "scalellm.fullname" -}}
{{- $name := .Release.Name -}}
{{- if not (contains "scalellm" $name) }}{{ $name = printf "%s-scalellm" $name }}{{ end -}}
{{- .Values.fullnameOverride | default $name | trunc 30 | trimSuffix "-" -}}
{{- end }}

{{/* Labels by which pods of a component are found. Takes {root, component, pool, group}. */}}
{{- define "scalellm.selector" -}}
app.kubernetes.io/name: scalellm
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- with .pool }}
scalellm/pool: {{ . }}
{{- end }}
{{- with .group }}
scalellm/group: {{ . | quote }}
{{- end }}
{{- end }}

{{- define "scalellm.labels" -}}
{{ include "scalellm.selector" . }}
app.kubernetes.io/version: {{ .root.Values.image.tag | default .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* Takes {root, name}. */}}
{{- define "scalellm.image" -}}
{{- with .root.Values.image }}{{ .registry }}scalellm/{{ $.name }}:{{ .tag | default $.root.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- define "scalellm.secretPrefix" -}}
{{ .Values.security.secretPrefix | default (include "scalellm.fullname" .) }}
{{- end }}

{{/* Security of a pod, and of each container in it: as deploy/images has it, and as compose.yaml starts it. */}}
{{- define "scalellm.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "scalellm.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* Where a pod may run. Takes {root, component, pool, values}. */}}
{{- define "scalellm.placement" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "scalellm.selector" . | nindent 8 }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/*
A probe. Takes {root, port, tls, service}; the service "liveness" is served as long as the process answers.
Kubernetes asks by gRPC itself from 1.24 on, and not over TLS: then the image's own health check does.
*/}}
{{- define "scalellm.probe" -}}
{{- if or .tls (semverCompare "<1.24.0-0" .root.Capabilities.KubeVersion.Version) -}}
exec:
  command: [python, -IS, /opt/scalellm/scalellm/services/common/health_check.py, "127.0.0.1:{{ .port }}"{{ with .service }}, {{ . }}{{ end }}]
{{- else -}}
grpc:
  port: {{ .port }}
  {{- with .service }}
  service: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* All three probes. Takes {root, port, tls, awaitsExecutor}. */}}
{{- define "scalellm.probes" -}}
{{- $live := include "scalellm.probe" (dict "root" .root "port" .port "tls" .tls "service" "liveness") -}}
# Ten minutes: a start that is killed too early begins anew on a node that is only slow, and never ends. A process per
# probe takes CPU time from the very start that it asks about, hence fewer of them.
{{- $period := hasPrefix "exec" $live | ternary 10 2 }}
startupProbe:
  {{- $live | nindent 2 }}
  periodSeconds: {{ $period }}
  timeoutSeconds: 5
  failureThreshold: {{ div 600 $period }}
livenessProbe:
  {{- $live | nindent 2 }}
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 6
readinessProbe:
  {{- if .awaitsExecutor }}
  {{- include "scalellm.probe" (dict "root" .root "port" .port "tls" .tls) | nindent 2 }}
  {{- else }}
  tcpSocket: {port: {{ .port }}}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end }}

{{/* Environment: a service's settings as {name: value}, and what Kubernetes takes as it is. Takes {prefix, settings, env}. */}}
{{- define "scalellm.env" -}}
{{- range $name, $value := .settings }}
- name: {{ printf "SCALELLM_%s_%s" $.prefix (upper $name) }}
  {{- if kindIs "map" $value }}
  valueFrom:
    secretKeyRef:
      {{- toYaml $value | nindent 6 }}
  {{- else if kindIs "float64" $value }}
  value: {{ if eq $value (floor $value) }}{{ $value | int64 | toString | quote }}{{ else }}{{ $value | toString | quote }}{{ end }}
  {{- else }}
  value: {{ $value | toString | quote }}
  {{- end }}
{{- end }}
{{- with .env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What a service shows and trusts by these options, and the link token, as YAML of settings. Takes {options}. */}}
{{- define "scalellm.innerTls" -}}
{{- range $option := .options }}
{{ $option }}_cert: /run/secrets/inner.pem
{{ $option }}_key: /run/secrets/inner.key
{{ $option }}_ca: /run/secrets/inner-ca.pem
{{- end }}
link_token_file: /run/secrets/link.token
{{- end }}

{{- define "scalellm.innerHealth" -}}
- {name: SCALELLM_HEALTH_TLS_CA, value: /run/secrets/inner-ca.pem}
- {name: SCALELLM_HEALTH_TLS_CERT, value: /run/secrets/inner.pem}
- {name: SCALELLM_HEALTH_TLS_KEY, value: /run/secrets/inner.key}
- {name: SCALELLM_HEALTH_TLS_NAME, value: {{ . }}}
{{- end }}

{{/* Where Redis is, as a setting's value; nothing where the Secret of the environment says it. */}}
{{- define "scalellm.redisSetting" -}}
{{- if .Values.redis.urlSecret }}
redis_url:
  {{- toYaml .Values.redis.urlSecret | nindent 2 }}
{{- else if .Values.redis.url }}
redis_url: {{ .Values.redis.url | quote }}
{{- else if not .Values.security.enabled }}
redis_url: redis://{{ include "scalellm.fullname" . }}-redis:6379/0
{{- end }}
{{- end }}

{{- define "scalellm.hasOwnRedis" -}}
{{- if not (or .Values.redis.url .Values.redis.urlSecret) }}true{{ end -}}
{{- end }}

{{/*
The models of the pools, the default one first, as JSON {models, served}: as executors name them, and as a tokenizer is told
of them, where NAME=MODEL stands for a name that a pool's settings give.
*/}}
{{- define "scalellm.models" -}}
{{- $models := list -}}
{{- $served := list -}}
{{- $pools := (include "scalellm.pools" . | fromJson).pools -}}
{{- range $isDefault := list true false -}}
{{- range $pools -}}
{{- if eq $isDefault (eq .model $.Values.model) -}}
{{- $models = append $models .model -}}
{{- $served = append $served (empty .settings.model_name | ternary .model (printf "%s=%s" .settings.model_name .model)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if not (has .Values.model $models) -}}
{{- fail (printf "model: no pool of executors runs %s" .Values.model) -}}
{{- end -}}
{{- dict "models" (uniq $models) "served" (uniq $served) | toJson -}}
{{- end }}

{{/* A container that fetches a model. Takes {root, image, model, name}. */}}
{{- define "scalellm.pull" -}}
- name: {{ .name }}
  image: {{ include "scalellm.image" (dict "root" .root "name" .image) }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [scalellm, models, pull, {{ .model | quote }}]
  env:
    - {name: SCALELLM_HOME, value: /var/lib/scalellm}
    {{- with .root.Values.models.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources:
    requests: {cpu: 100m, memory: 256Mi}
    limits: {memory: 4Gi}
  {{- include "scalellm.containerSecurity" . | nindent 2 }}
  volumeMounts:
    - {name: models, mountPath: /var/lib/scalellm/models}
    - {name: tmp, mountPath: /tmp}
{{- end }}

{{/* The pools with their defaults and the kind of their object, as JSON {pools}. Maps of a pool are merged into the defaults; volumes are taken whole. */}}
{{- define "scalellm.pools" -}}
{{- $pools := list -}}
{{- $names := list -}}
{{- range .Values.executors -}}
{{- $pool := mergeOverwrite (deepCopy $.Values.executorDefaults) (deepCopy .) -}}
{{- $_ := set $pool "modelVolume" (.modelVolume | default $.Values.executorDefaults.modelVolume | default (include "scalellm.modelVolume" $ | fromYaml)) -}}
{{- $_ := set $pool "kernelVolume" (.kernelVolume | default $.Values.executorDefaults.kernelVolume | default (dict "emptyDir" dict)) -}}
{{- $_ := set $pool "model" ($pool.model | default $.Values.model) -}}
{{- if has .name $names }}{{ fail (printf "executors: two pools have the name %s" .name) }}{{ end -}}
{{- if and (eq (int $pool.maxSurge) 0) (eq (int $pool.maxUnavailable) 0) -}}
{{- fail (printf "executors: pool %s: maxSurge and maxUnavailable: one of them has to be above 0" .name) -}}
{{- end -}}
{{- if and $pool.autoscaling.enabled (gt (int $pool.autoscaling.minReplicas) (int $pool.autoscaling.maxReplicas)) -}}
{{- fail (printf "executors: pool %s: autoscaling: minReplicas is above maxReplicas" .name) -}}
{{- end -}}
{{- $_ := set $pool "kind" "Deployment" -}}
{{- if gt (int $pool.nodes) 1 -}}
{{- if mod (int $pool.tensorParallel) (int $pool.nodes) -}}
{{- fail (printf "executors: pool %s: nodes: %v does not divide tensorParallel, %v" .name $pool.nodes $pool.tensorParallel) -}}
{{- end -}}
{{- if not $.Values.security.enabled -}}
{{- fail (printf "executors: pool %s: nodes: %v hosts know one another by the link token: security.enabled has to be true" .name $pool.nodes) -}}
{{- end -}}
{{- $hasSets := $.Capabilities.APIVersions.Has "leaderworkerset.x-k8s.io/v1/LeaderWorkerSet" -}}
{{- $kind := eq $pool.groupKind "auto" | ternary ($hasSets | ternary "LeaderWorkerSet" "StatefulSet") $pool.groupKind -}}
{{- $_ := set $pool "kind" $kind -}}
{{- /* Pods carry the name of their StatefulSet and 11 characters more in a label, which may have 63. */ -}}
{{- $last := max (int $pool.replicas) (int $pool.autoscaling.maxReplicas) -}}
{{- $set := printf "%s-executor-%s%s-%v" (include "scalellm.fullname" $) .name (eq $kind "LeaderWorkerSet" | ternary "-lws" "") $last -}}
{{- if gt (len $set) 52 -}}
{{- fail (printf "executors: pool %s: name: its last StatefulSet would be %s: %d characters, Kubernetes takes 52; shorten it or fullnameOverride" .name $set (len $set)) -}}
{{- end -}}
{{- if eq $kind "StatefulSet" -}}
{{- if $pool.autoscaling.enabled -}}
{{- fail (printf "executors: pool %s: autoscaling: of executors over several hosts (nodes) takes a LeaderWorkerSet (groupKind)" .name) -}}
{{- end -}}
{{- if semverCompare "<1.28.0-0" $.Capabilities.KubeVersion.Version -}}
{{- fail (printf "executors: pool %s: nodes: above 1 takes Kubernetes 1.28, or a LeaderWorkerSet (groupKind)" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- $pools = append $pools $pool -}}
{{- end -}}
{{- dict "pools" $pools | toJson -}}
{{- end }}

{{/* True unless all pools may be without executors: then nothing may wait for one to be ready. */}}
{{- define "scalellm.keepsExecutors" -}}
{{- range (include "scalellm.pools" . | fromJson).pools }}{{ if not (and .autoscaling.enabled (eq (int .autoscaling.minReplicas) 0)) }}true{{ end }}{{ end -}}
{{- end }}

{{/* Source of the volume of models. */}}
{{- define "scalellm.modelVolume" -}}
{{- toYaml (.Values.models.volume | default (dict "emptyDir" dict)) -}}
{{- end }}

{{/* The pods of a component, as a peer of a network policy. Takes {root, component}. */}}
{{- define "scalellm.peer" -}}
podSelector: {matchLabels: {app.kubernetes.io/name: scalellm, app.kubernetes.io/instance: {{ .root.Release.Name }}, app.kubernetes.io/component: {{ .component }}}}
{{- end }}
